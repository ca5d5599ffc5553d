"""Algorithm 1 on its own: scores in, choice out, and no model anywhere."""

from rosa.selection.algorithm import Selection, Selector

LAYERS = (3, 4, 5, 6, 8)


def selector(**changes):
    return Selector(LAYERS, **dict(k_ratio=0.4, interval=2, warmup_steps=3, p_exploit=0.5, seed=2333) | changes)


def run(algorithm, steps):
    """Some steps, each layer's score its own place."""
    for _ in range(steps):
        if algorithm.selects_next:
            algorithm.adopt(algorithm.choose(LAYERS, (1.0, 2.0, 3.0, 4.0, 5.0)))
        algorithm.steps += 1
    return algorithm


def test_it_selects_every_interval_once_the_warmup_is_over():
    for interval, warmup, steps in ((1, 0, [1, 2, 3, 4, 5, 6]), (2, 3, [4, 6]), (3, 3, [6]), (4, 6, [])):
        assert [s.step for s in run(selector(interval=interval, warmup_steps=warmup), 6).history] == steps


def test_exploiting_takes_the_top_k_by_score_and_of_equal_ones_the_lower_layer():
    algorithm = selector(p_exploit=1.0)
    assert algorithm.selected_layers == LAYERS and algorithm.k == 2
    assert algorithm.choose(LAYERS, (1.0, 9.0, 2.0, 2.0, 0.0)) == Selection(1, (4, 5), True, (1.0, 9.0, 2.0, 2.0, 0.0))
    assert algorithm.choose(LAYERS, (1.0,) * 5).layers == (3, 4)


def test_priorities_rank_the_layers_from_the_scores_and_the_course_so_far():
    def least_chosen(history, scores):
        return [scores[i] - 10 * sum(LAYERS[i] in made.layers for made in history) for i in range(len(LAYERS))]

    algorithm = run(selector(p_exploit=1.0, interval=1, warmup_steps=0, priorities=least_chosen), 3)
    assert [made.layers for made in algorithm.history] == [(6, 8), (4, 5), (3, 8)]
    assert all(made.scores == (1.0, 2.0, 3.0, 4.0, 5.0) for made in algorithm.history)


def test_a_choice_holds_only_once_it_is_adopted():
    algorithm = selector(p_exploit=1.0)
    chosen = algorithm.choose(LAYERS, (1.0, 2.0, 3.0, 4.0, 5.0))
    assert algorithm.selected_layers == LAYERS and algorithm.history == []
    algorithm.adopt(chosen)
    assert algorithm.selected_layers == (6, 8) and algorithm.history == [chosen]


def test_a_state_goes_on_as_if_it_had_not_stopped():
    straight = run(selector(interval=1), 30)
    resumed = selector(interval=1, seed=1)
    resumed.load_state_dict(run(selector(interval=1), 11).state_dict())
    assert run(resumed, 19).history == straight.history and resumed.selected_layers == straight.selected_layers
    assert {made.exploited for made in straight.history[11:]} == {True, False}
