"""DynamicLayerSelection: the two modes, the sequence of selections, and everyone who takes it for an optimizer."""

import copy
import gc
import io
import pickle

import pytest
import torch
from accelerate import Accelerator
from peft import LNTuningConfig, LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, OlmoConfig, OlmoForCausalLM

import rosa
from rosa import DynamicLayerSelection
from rosa.models.decoder import decoder_layers
from rosa.selection import freezing

NORMS = ["input_layernorm", "post_attention_layernorm"]


def wrap(model, *, kind=torch.optim.AdamW, lr=1e-2, **options):
    optimizer = kind(rosa.trainable_parameters(model), lr=lr, weight_decay=0.1)
    return DynamicLayerSelection(optimizer, model, **{"interval": 5} | options)


def backward(model, batch, scale=1.0):
    (model(**batch).loss * scale).backward()


def train(model, optimizer, batch, steps, clip=None):
    for _ in range(steps):
        backward(model, batch)
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("clip", [None, 0.001], ids=["plain", "clipped"])
def test_mask_and_skip_take_bitwise_the_same_course(make_patched, batch, kind, clip):
    ends = {}
    for mode in ("mask", "skip"):
        model = make_patched(hidden_size=16, num_hidden_layers=6).train()
        optimizer = wrap(model, kind=kind, mode=mode, interval=7, warmup_steps=10)
        train(model, optimizer, batch, 200, clip)
        ends[mode] = values(model), optimizer.history
    assert equal(ends["mask"][0], ends["skip"][0])
    assert ends["mask"][1] == ends["skip"][1] and len(ends["mask"][1]) == 27
    assert not equal(ends["mask"][0], values(make_patched(hidden_size=16, num_hidden_layers=6)))


@pytest.mark.parametrize("mode", ["mask", "skip"])
def test_layers_outside_the_selection_do_not_move_and_count_no_step(make_patched, batch, mode):
    model = make_patched().train()
    optimizer = wrap(model, mode=mode, k_ratio=0.25)
    assert optimizer.selected_layers == (0, 1, 2, 3)  # before the first selection all layers train
    train(model, optimizer, batch, 4)
    before = values(model)
    steps_before = {p: s["step"].item() for p, s in optimizer.state.items()}
    train(model, optimizer, batch, 5)  # selects at step 5, which is masked already, and holds to step 9
    (chosen,) = optimizer.selected_layers
    for name, parameter in model.named_parameters():
        if parameter in optimizer.state:
            moved = f"layers.{chosen}." in name
            assert torch.equal(parameter, before[name]) != moved
            assert optimizer.state[parameter]["step"].item() - steps_before[parameter] == (5 if moved else 0)
        else:
            assert torch.equal(parameter, before[name])


def test_skip_freezes_until_the_step_before_the_next_selection(make_patched, batch):
    model = make_patched().train()
    optimizer = wrap(model, k_ratio=0.5, interval=3)
    before = rosa.count_parameters(model)[0]
    trains = []
    for _ in range(7):
        trains.append([layer.self_attn.roae.up.requires_grad for layer in model.model.layers])
        train(model, optimizer, batch, 1)
    everyone = [True] * 4
    assert [t == everyone for t in trains] == [True, True, True, False, False, True, False]
    assert sum(trains[3]) == 2
    assert sum(layer.self_attn.roae.up.requires_grad for layer in model.model.layers) == 2
    assert len(rosa.trainable_parameters(model)) == 4 * 6 and rosa.count_parameters(model)[0] == before
    optimizer.unfreeze()
    assert all(layer.self_attn.roae.up.requires_grad for layer in model.model.layers)
    assert len(rosa.trainable_parameters(model)) == 4 * 6


class Fixed(torch.nn.Module):
    """A decoder of five layers that are nothing but their two norms, whose gradients the test sets."""

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.input_layernorm = torch.nn.LayerNorm(2, bias=False)
            self.post_attention_layernorm = torch.nn.LayerNorm(2, bias=False)

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(self.Layer() for _ in range(5))

    def set_gradients(self, attention, mlp):
        for layer, a, m in zip(self.layers, attention, mlp, strict=True):
            layer.input_layernorm.weight.grad = torch.tensor([a, 0.0])
            layer.post_attention_layernorm.weight.grad = torch.tensor([0.0, m])


def fixed(**options):
    model = Fixed()
    return model, DynamicLayerSelection(torch.optim.SGD(model.parameters(), lr=0.1), model, **options)


def test_scores_are_equation_5_and_the_top_k_are_chosen():
    model, optimizer = fixed(interval=1, p_exploit=1.0, k_ratio=0.4)
    model.set_gradients([3.0, 0.0, 6.0, 1.0, 0.0], [4.0, 2.0, 8.0, 0.0, 0.5])
    optimizer.step()
    assert optimizer.scores == (5.0, 2.0, 10.0, 1.0, 0.5)
    assert optimizer.selected_layers == (0, 2)
    model.set_gradients([1.0] * 5, [1.0] * 5)
    optimizer.step()
    assert optimizer.selected_layers == (0, 1)  # of equal scores the lower layer


def adapter_norms(model, name):
    """The L2 norm of each layer's gradients of the parameters so named, once more by hand."""
    of_layers = [[p.grad for n, p in layer.named_parameters() if name in n] for layer in model.model.layers]
    return [torch.stack([grad.norm() for grad in grads if grad is not None]).norm().item() for grads in of_layers]


def test_norms_without_weights_are_named_and_the_adapter_ranks_layers_instead(batch):
    sizes = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
    model = rosa.patch(OlmoForCausalLM(OlmoConfig(**sizes, pad_token_id=0)), rosa.RosaConfig(rank=4)).train()
    with pytest.raises(rosa.UnsupportedModelError, match=r"layers.0 \(OlmoDecoderLayer\) has norms without weights.*"):
        wrap(model)
    optimizer = wrap(model, score="adapter", interval=1, p_exploit=1.0)
    for _ in range(3):  # W_up starts at zero, and lets no other gradient through
        backward(model, batch)
        expected = adapter_norms(model, "roae")
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.scores == pytest.approx(expected)
    best = sorted(range(4), key=lambda i: -expected[i])[:2]
    assert optimizer.selected_layers == tuple(sorted(best))


@pytest.mark.parametrize("mode", ["mask", "skip"])
def test_lora_parameters_rank_layers_too(make_model, batch, mode):
    model = get_peft_model(make_model(), LoraConfig(r=2, target_modules="all-linear")).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = DynamicLayerSelection(
        torch.optim.AdamW(parameters, lr=1e-2), model, interval=3, k_ratio=0.25, mode=mode, score="adapter"
    )
    train(model, optimizer, batch, 2)
    backward(model, batch)
    expected = adapter_norms(model.model, "lora_")
    optimizer.step()
    assert optimizer.scores == pytest.approx(expected)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "norm" in n)


def test_the_norms_that_are_trained_do_not_count_as_adapter(make_patched, batch):
    model = make_patched().train()
    optimizer = wrap(model, score="adapter", interval=1)
    backward(model, batch)
    expected = adapter_norms(model, "roae")
    optimizer.step()
    assert optimizer.scores == pytest.approx(expected)
    norms = torch.optim.SGD([p for n, p in model.named_parameters() if "layernorm" in n], lr=0.1)
    with pytest.raises(ValueError, match="nothing of model.layers.0 but its norms"):
        DynamicLayerSelection(norms, model, score="adapter")


def test_the_sequence_of_a_known_seed_and_known_scores():
    def sequence(seed):
        model, optimizer = fixed(interval=2, warmup_steps=3, p_exploit=0.5, k_ratio=0.4, seed=seed)
        for step in range(1, 17):
            model.set_gradients([1.0, 2.0, 3.0, 4.0, 5.0], [float(step)] * 5)
            optimizer.step()
        return [(s.step, s.layers, s.exploited) for s in optimizer.history]

    assert sequence(2333) == [
        (4, (1, 4), False),
        (6, (0, 3), False),
        (8, (3, 4), True),
        (10, (3, 4), True),
        (12, (1, 3), False),
        (14, (3, 4), True),
        (16, (3, 4), False),
    ]
    assert sequence(2333) != sequence(2334)


@pytest.mark.parametrize("p_exploit", [0.0, 0.3, 0.8, 1.0])
def test_frequency_of_exploitation(p_exploit):
    model, optimizer = fixed(interval=1, p_exploit=p_exploit, k_ratio=0.2)
    chosen = torch.zeros(5)
    for _ in range(1000):
        model.set_gradients([0.0, 0.0, 0.0, 0.0, 1.0], [0.0] * 5)
        optimizer.step()
        chosen[optimizer.selected_layers[0]] += 1
    exploited = sum(s.exploited for s in optimizer.history)
    spread = 4 * (1000 * p_exploit * (1 - p_exploit)) ** 0.5
    assert abs(exploited - 1000 * p_exploit) <= spread
    # Random choices fall on every layer alike: one in five of them on each.
    for count in chosen[:4]:
        assert abs(count - (1000 - exploited) / 5) <= 4 * (1000 * 0.16) ** 0.5


@pytest.mark.parametrize(("k_ratio", "k"), [(0.01, 1), (0.4, 2), (0.5, 2), (0.6, 3), (1, 5)])
def test_k_is_the_floor_and_at_least_one(k_ratio, k):
    assert fixed(k_ratio=k_ratio)[1].k == k


@pytest.mark.parametrize("mode", ["mask", "skip"])
@pytest.mark.parametrize("stop", [4, 12, 17])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(make_patched, batch, mode, stop, tmp_path):
    straight = make_patched().train()
    whole = wrap(straight, mode=mode)
    train(straight, whole, batch, 30)

    first = make_patched().train()
    begun = wrap(first, mode=mode)
    train(first, begun, batch, stop)
    torch.save({"model": first.state_dict(), "optimizer": begun.state_dict()}, tmp_path / "checkpoint")

    saved = torch.load(tmp_path / "checkpoint", weights_only=True)
    second = make_patched().train()
    second.load_state_dict(saved["model"])
    resumed = wrap(second, mode=mode, seed=1)
    resumed.load_state_dict(saved["optimizer"])
    train(second, resumed, batch, 30 - stop)
    assert equal(values(straight), values(second)) and resumed.history == whole.history


def test_gradient_accumulation_equals_one_large_batch(make_patched, batch):
    def accumulate(parts):
        model = make_patched(dtype=torch.float64, config=rosa.RosaConfig(rank=4, adapter_dtype="float64")).train()
        optimizer = wrap(model, kind=torch.optim.SGD)
        for _ in range(12):
            for _ in range(parts):
                backward(model, batch, 1 / parts)
            optimizer.step()
            optimizer.zero_grad()
        return values(model), optimizer

    (whole, one), (parts, four) = accumulate(1), accumulate(4)
    assert [s.layers for s in one.history] == [s.layers for s in four.history]
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name])


def test_grad_scaler_over_an_fp16_base(make_patched, batch):
    model = make_patched(dtype=torch.float16).train()
    optimizer, scaler = wrap(model, interval=1), torch.amp.GradScaler("cpu", init_scale=8.0)
    before = values(model)
    scaler.scale(model(**batch).loss).backward()
    scaler.step(optimizer)  # refuses 16-bit parameters
    assert not equal(before, values(model)) and len(optimizer.history) == 1


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler(make_patched, batch, fused):
    ends = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        model = make_patched().train()
        adamw = torch.optim.AdamW(rosa.trainable_parameters(model), lr=1e-2, fused=fused)
        optimizer = DynamicLayerSelection(adamw, model, interval=3)
        for _ in range(10):
            loss = model(**batch).loss
            if scaler is None:
                loss.backward()
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
        ends.append((values(model), [s.layers for s in optimizer.history]))
    assert ends[0][1] == ends[1][1]
    for name in ends[0][0]:
        torch.testing.assert_close(ends[0][0][name], ends[1][0][name])


def test_a_step_that_the_grad_scaler_skips_is_no_step(make_patched, batch):
    model = make_patched().train()
    optimizer = wrap(model, interval=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(model(**batch).loss).backward()
    model.model.layers[0].input_layernorm.weight.grad[0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.history == [] and optimizer.selected_layers == (0, 1, 2, 3)


def test_a_scale_too_large_for_norms_that_only_serve_the_score_says_what_to_do(make_patched, batch):
    def step(**options):
        config = rosa.RosaConfig(rank=4, train_norms=False)  # whose parameters are in float32
        model = make_patched(dtype=torch.float16, config=config).train()
        optimizer, scaler = wrap(model, interval=1, **options), torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(model(**batch).loss).backward()
        norm = model.model.layers[1].input_layernorm.weight
        norm.grad = torch.full_like(norm, 2.0**15) * 4  # as a larger scale would have it
        scaler.step(optimizer)
        return optimizer

    with pytest.raises(FloatingPointError, match=r"layer 1's norms are .* step 1: .*in float16.*score='adapter'"):
        step()
    assert len(step(score="adapter").history) == 1


def test_learning_rate_schedulers(make_patched, batch):
    model = make_patched().train()
    optimizer = wrap(model, lr=1.0)
    assert isinstance(optimizer, torch.optim.Optimizer) and optimizer.param_groups is optimizer.optimizer.param_groups
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for step in range(3):
        assert optimizer.param_groups[0]["lr"] == 0.5**step
        train(model, optimizer, batch, 1)
        scheduler.step()
    other = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    other.step(1.0), other.step(2.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5**3 * 0.1)


def test_closures_and_step_hooks(make_patched, batch):
    model = make_patched().train()
    optimizer = wrap(model)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure():
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > optimizer.step(closure).item()
    assert calls == ["after", "after"]


def test_hooks_on_its_state_are_the_wrapped_optimizers(make_patched):
    optimizer = wrap(make_patched())
    calls = []

    def note(name):
        return lambda called_by, *_: calls.append((name, called_by))

    optimizer.register_state_dict_pre_hook(note("save"))
    optimizer.register_state_dict_post_hook(lambda _, state: state | {"theirs": 1})
    optimizer.register_load_state_dict_pre_hook(note("load"))
    optimizer.register_load_state_dict_post_hook(note("loaded"))
    state = optimizer.state_dict()
    assert state["theirs"] == 1
    optimizer.load_state_dict(state)
    assert calls == [(name, optimizer.optimizer) for name in ("save", "load", "loaded")]


ONE_CALL = [
    getattr(torch.optim, name)
    for name in (
        "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "Muon", "NAdam", "RAdam", "RMSprop",
        "Rprop", "SGD",
    )
]  # fmt: skip


@pytest.mark.parametrize("kind", ONE_CALL, ids=lambda kind: kind.__name__)
def test_every_optimizer_of_torch_leaves_layers_out_and_takes_a_closure(make_patched, batch, kind):
    ends, calls = [], 0
    for with_closure in (False, True):
        model = make_patched(hidden_size=16).train()
        optimizer = DynamicLayerSelection(kind(matrices(model), lr=1e-2), model, interval=2, k_ratio=0.25)

        def closure(model=model, optimizer=optimizer):
            nonlocal calls
            calls += 1
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            return loss

        for step in range(5):
            before = values(model)
            if with_closure:
                assert torch.is_tensor(optimizer.step(closure))
            else:
                backward(model, batch)
                optimizer.step()
                optimizer.zero_grad()
            moved = {n.split(".")[2] for n, p in model.named_parameters() if not torch.equal(p, before[n])}
            assert moved == {str(layer) for layer in optimizer.selected_layers}, step
        ends.append(values(model))
    assert equal(*ends) and calls == 5


def test_an_optimizer_that_needs_its_closure_is_refused_and_nothing_is_frozen(make_patched):
    model = make_patched()
    lbfgs = torch.optim.LBFGS(rosa.trainable_parameters(model))
    torch.optim.lr_scheduler.ConstantLR(lbfgs)  # wraps its step
    with pytest.raises(TypeError, match="LBFGS calls its closure several times a step.*needs no closure"):
        DynamicLayerSelection(lbfgs, model)
    assert all(p.requires_grad for p in rosa.trainable_parameters(model))
    assert wrap(model).layers == (0, 1, 2, 3)


def backward_flops(model, batch):
    loss = model(**batch).loss
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    model.zero_grad()
    return counter.get_total_flops()


def test_backward_costs_less_the_higher_the_lowest_selected_layer(make_patched, batch):
    model = make_patched().train()
    optimizer = wrap(model, k_ratio=0.25, p_exploit=1.0, interval=2)
    flops = []
    for wanted in range(4):
        for step in (1, 2):
            backward(model, batch)
            if step == 2:
                model.model.layers[wanted].input_layernorm.weight.grad += 1e6
            optimizer.step()
            optimizer.zero_grad()
        assert optimizer.selected_layers == (wanted,)
        flops.append(backward_flops(model, batch))
        train(model, optimizer, batch, 1)
        assert backward_flops(model, batch) > flops[0]  # the step before a selection computes every layer's gradients
        optimizer._selector.steps -= 1  # back to the step after a selection
    assert flops == sorted(flops, reverse=True) and flops[3] < 0.4 * flops[0]


def test_a_lora_model_whose_norms_are_frozen(make_model, batch):
    model = get_peft_model(make_model(), LoraConfig(r=2, target_modules="all-linear")).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = DynamicLayerSelection(torch.optim.AdamW(parameters, lr=1e-2), model, interval=3, k_ratio=0.25)
    before = values(model)
    train(model, optimizer, batch, 7)
    assert len(optimizer.history) == 2 and all(score > 0 for score in optimizer.scores)
    after = values(model)
    assert {n for n in before if not torch.equal(before[n], after[n])} <= {n for n in before if "lora_" in n}
    norms = [p for n, p in model.named_parameters() if "norm" in n]
    assert not any(norm.requires_grad for norm in norms)
    train(model, optimizer, batch, 1)  # the next step selects
    assert sum(norm.requires_grad for norm in norms) == 2 * 4
    optimizer.unfreeze()
    assert not any(p.requires_grad for p in norms) and all(p.requires_grad for p in parameters)


@pytest.mark.parametrize(
    "config",
    [LNTuningConfig(target_modules=NORMS), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=NORMS)],
    ids=["ln_tuning", "modules_to_save"],
)
def test_norms_that_peft_has_wrapped_rank_layers(make_model, batch, config):
    model = get_peft_model(make_model(), config).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = DynamicLayerSelection(torch.optim.AdamW(parameters, lr=1e-2), model, interval=2, k_ratio=0.25)
    train(model, optimizer, batch, 1)
    backward(model, batch)
    trained = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and "layernorm" in n}
    optimizer.step()
    assert len(trained) == 8
    for layer, score in enumerate(optimizer.scores):
        gradients = [grad for name, grad in trained.items() if f"layers.{layer}." in name]
        torch.testing.assert_close(score, torch.nn.utils.get_total_norm(gradients).item())
    names = [name for layer in decoder_layers(model) for name in layer.norms]
    assert names == [f"base_model.model.model.layers.{layer}.{norm}" for layer in range(4) for norm in NORMS]


def test_a_plain_model(make_model, batch):
    model = make_model().train()
    optimizer = DynamicLayerSelection(torch.optim.SGD(model.parameters(), lr=1e-2), model, interval=2, k_ratio=0.5)
    train(model, optimizer, batch, 2)
    before = values(model)
    train(model, optimizer, batch, 1)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    layers = {int(n.split(".")[2]) for n in moved if ".layers." in n}
    assert layers == set(optimizer.selected_layers) and {"lm_head.weight", "model.norm.weight"} <= moved


@pytest.mark.parametrize("mode", ["mask", "skip"])
def test_an_optimizer_that_holds_a_frozen_base_too_leaves_it_frozen(make_model, batch, mode):
    model = get_peft_model(make_model(), LoraConfig(r=2, target_modules="all-linear")).train()
    before, trainable = values(model), {n for n, p in model.named_parameters() if p.requires_grad}
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = DynamicLayerSelection(adamw, model, interval=3, mode=mode)
    train(model, optimizer, batch, 8)
    after = values(model)
    assert {n for n in before if not torch.equal(before[n], after[n])} <= trainable
    optimizer.unfreeze()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable


@pytest.mark.parametrize("gone", ["deleted", "unfrozen"])
def test_mask_drops_nothing_once_its_optimizer_is_gone(make_patched, batch, gone):
    model = make_patched().train()
    optimizer = wrap(model, mode="mask", interval=2, k_ratio=0.25)
    train(model, optimizer, batch, 2)
    backward(model, batch)
    assert sum(layer.self_attn.roae.up.grad is not None for layer in model.model.layers) == 1
    if gone == "deleted":
        del optimizer
        gc.collect()
    else:
        optimizer.unfreeze()
    backward(model, batch)
    assert all(p.grad is not None for p in rosa.trainable_parameters(model))


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "gone"])
@pytest.mark.parametrize("mode", ["mask", "skip"])
def test_a_second_optimizer_trains_all_that_the_first_one_left_out(make_patched, batch, mode, kept):
    model = make_patched().train()
    first = wrap(model, mode=mode, interval=2)
    scheduler = torch.optim.lr_scheduler.ConstantLR(first)
    train(model, first, batch, 2)
    assert len(first.selected_layers) == 2
    if not kept:
        del first, scheduler
        gc.collect()
    second = wrap(model, mode=mode, interval=2)
    backward(model, batch)
    assert second.selected_layers == (0, 1, 2, 3)
    assert all(p.grad is not None for p in rosa.trainable_parameters(model))


def test_a_second_optimizer_that_would_lack_frozen_lora_parameters_is_refused(make_model, batch):
    model = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"])).train()
    first = wrap(model, interval=2)
    train(model, first, batch, 2)
    with pytest.raises(ValueError, match=r"frozen 8 parameters that this optimizer lacks.*unfreeze\(\)"):
        wrap(model)
    first.unfreeze()
    assert wrap(model).layers == (0, 1, 2, 3)


def matrices(model):
    return [p for p in rosa.trainable_parameters(model) if p.ndim == 2]


def norms(model):
    return [p for p in rosa.trainable_parameters(model) if p.ndim == 1]


def test_norms_beside_the_wrapped_optimizer_are_left_to_the_other_one(make_patched, batch):
    ends = {}
    for mode in ("mask", "skip"):
        model = make_patched(hidden_size=16).train()
        muon = torch.optim.Muon(matrices(model), lr=1e-2)
        optimizer = DynamicLayerSelection(muon, model, interval=3, k_ratio=0.25, mode=mode)
        adamw = torch.optim.AdamW(norms(model), lr=1e-2)
        for _ in range(10):
            before = values(model)
            backward(model, batch)
            optimizer.step()
            optimizer.zero_grad()
            assert len(norms(model)) == 8 and all(p.requires_grad and p.grad is not None for p in norms(model))
            adamw.step()
            adamw.zero_grad()
            moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
            assert sum("norm" in name for name in moved) == 8
            layers = {int(name.split(".")[2]) for name in moved if "roae" in name}
            assert layers == set(optimizer.selected_layers)
        assert len(optimizer.history) == 3 and all(score > 0 for score in optimizer.scores)
        optimizer.unfreeze()
        assert all(p.requires_grad for p in norms(model))
        ends[mode] = values(model), optimizer.history
    assert equal(ends["mask"][0], ends["skip"][0]) and ends["mask"][1] == ends["skip"][1]


def test_norms_that_another_optimizer_has_cleared_too_early_are_told(make_patched, batch):
    model = make_patched().train()
    optimizer = DynamicLayerSelection(torch.optim.Muon(matrices(model), lr=1e-2), model, interval=1)
    backward(model, batch)
    torch.optim.AdamW(norms(model)).zero_grad()
    with pytest.raises(RuntimeError, match=r"no norm has a gradient.*another optimizer's zero_grad\(\) after it"):
        optimizer.step()


@pytest.mark.parametrize("cleared", [True, False])
def test_gradients_that_nobody_clears_are_told_for_they_add_up_in_the_scores(make_patched, batch, cleared, recwarn):
    freezing._warn_once.cache_clear()
    model = make_patched().train()
    optimizer = DynamicLayerSelection(torch.optim.AdamW(matrices(model), lr=1e-3), model, interval=2)
    for _ in range(4):
        backward(model, batch)
        optimizer.step()
        (model if cleared else optimizer).zero_grad()
    told = [str(warning.message) for warning in recwarn if "kept their gradients" in str(warning.message)]
    assert len(told) == (not cleared)


def with_norms_later(model, mode, **options):
    optimizer = DynamicLayerSelection(torch.optim.AdamW(matrices(model), lr=1e-2), model, mode=mode, **options)
    optimizer.add_param_group({"params": norms(model), "weight_decay": 0.0})
    return optimizer


@pytest.mark.parametrize("mode", ["mask", "skip"])
def test_a_group_that_comes_later_belongs_to_its_layers_like_one_from_the_start(make_patched, batch, mode):
    ends = []
    for later in (False, True):
        model = make_patched(hidden_size=16).train()
        if later:
            optimizer = with_norms_later(model, mode, interval=3, k_ratio=0.25)
        else:
            groups = [{"params": matrices(model)}, {"params": norms(model), "weight_decay": 0.0}]
            adamw = torch.optim.AdamW(groups, lr=1e-2)
            optimizer = DynamicLayerSelection(adamw, model, interval=3, k_ratio=0.25, mode=mode)
        train(model, optimizer, batch, 8)
        ends.append((values(model), optimizer.history))
    start = values(make_patched(hidden_size=16))
    assert sum(not torch.equal(start[n], v) for n, v in ends[0][0].items() if "layernorm" in n) == 8
    assert equal(ends[0][0], ends[1][0]) and ends[0][1] == ends[1][1]


@pytest.mark.parametrize("frozen", [False, True], ids=["rosa", "lora, norms frozen"])
def test_a_group_between_two_selections_in_both_modes_and_resumed(make_model, make_patched, batch, frozen):
    def started(mode):
        if frozen:
            model = get_peft_model(make_model(hidden_size=16), LoraConfig(r=2, target_modules=["q_proj"])).train()
            own = [p for n, p in model.named_parameters() if "norm" in n and "layers" in n]
        else:
            model = make_patched(hidden_size=16).train()
            own = norms(model)
        adamw = torch.optim.AdamW(matrices(model), lr=1e-2)
        return model, own, DynamicLayerSelection(adamw, model, interval=4, k_ratio=0.25, mode=mode)

    ends = {}
    for mode in ("mask", "skip"):
        model, own, optimizer = started(mode)
        train(model, optimizer, batch, 5)
        optimizer.zero_grad()
        model.zero_grad()
        optimizer.add_param_group({"params": own})
        before = values(model)
        train(model, optimizer, batch, 1)
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert {n.partition("layers.")[2][0] for n in moved} == {str(optimizer.selected_layers[0])}
        assert sum("norm" in n for n in moved) == 2
        saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
        train(model, optimizer, batch, 9)
        ends[mode] = values(model)
        other, own, resumed = started(mode)
        resumed.add_param_group({"params": own})
        other.load_state_dict(saved[0])
        resumed.load_state_dict(saved[1])
        train(other, resumed, batch, 9)
        assert equal(values(other), ends[mode]) and resumed.history == optimizer.history
        optimizer.unfreeze()
        assert all(p.requires_grad for p in own)
    assert equal(ends["mask"], ends["skip"])


@pytest.mark.parametrize("mode", ["mask", "skip"])
def test_a_later_group_of_no_layer_that_takes_part_always_trains(make_patched, batch, mode):
    model = make_patched(config=rosa.RosaConfig(rank=4, layers=(2, 3))).train()
    optimizer = wrap(model, mode=mode, interval=2, k_ratio=0.5)
    later = [model.lm_head.weight, model.model.layers[0].mlp.up_proj.weight]
    for parameter in later:
        parameter.requires_grad_(True)
    optimizer.add_param_group({"params": later})
    for _ in range(5):
        before = [p.detach().clone() for p in later]
        train(model, optimizer, batch, 1)
        assert not any(torch.equal(p, b) for p, b in zip(later, before, strict=True))
    assert optimizer.layers == (2, 3)


def test_a_later_group_leaves_a_frozen_base_in_the_optimizer_frozen(make_model, batch):
    model = get_peft_model(make_model(), LoraConfig(r=2, target_modules="all-linear")).train()
    frozen = [p for p in model.parameters() if not p.requires_grad]
    head = model.base_model.model.lm_head.weight
    rest = [p for p in model.parameters() if p is not head]
    optimizer = DynamicLayerSelection(torch.optim.SGD(rest, lr=0.1), model, interval=2)
    train(model, optimizer, batch, 1)
    optimizer.add_param_group({"params": [head]})
    before = [p.detach().clone() for p in frozen]
    train(model, optimizer, batch, 4)
    assert all(torch.equal(p, b) for p, b in zip(frozen, before, strict=True))


def test_two_selections_over_the_same_layers_are_refused(make_patched, batch):
    model = make_patched().train()
    first = DynamicLayerSelection(torch.optim.Muon(matrices(model), lr=1e-2), model, interval=2)
    train(model, first, batch, 2)
    flags = [p.requires_grad for p in model.parameters()]
    adamw = torch.optim.AdamW(norms(model), lr=1e-2)
    with pytest.raises(ValueError, match=r"two would select apart.*one optimizer.*leave the other plain.*unfreeze\(\)"):
        DynamicLayerSelection(adamw, model)
    assert [p.requires_grad for p in model.parameters()] == flags
    train(model, first, batch, 1)  # still in charge
    first.unfreeze()
    second = DynamicLayerSelection(adamw, model, interval=2)
    train(model, second, batch, 2)
    backward(model, batch)
    for call in (first.step, lambda: first.load_state_dict(first.state_dict())):
        with pytest.raises(RuntimeError, match="a later DynamicLayerSelection has taken over"):
            call()
    with pytest.raises(RuntimeError, match="a later DynamicLayerSelection has taken over"):
        first.add_param_group({"params": norms(model)})
    assert len(first.param_groups) == 1


def test_two_selections_over_different_layers_go_together(make_patched, batch):
    model = make_patched().train()
    lower, upper = (
        DynamicLayerSelection(
            torch.optim.SGD([p for layer in layers for p in layer.parameters() if p.requires_grad], lr=0.1), model
        )
        for layers in (model.model.layers[:2], model.model.layers[2:])
    )
    backward(model, batch)
    lower.step(), upper.step()
    assert (lower.layers, upper.layers) == ((0, 1), (2, 3))


def test_a_second_selection_that_fails_leaves_the_first_in_charge(make_patched, batch):
    model = make_patched().train()
    first = wrap(model, interval=2)
    with pytest.raises(ValueError, match="nothing of model.layers.0 but its norms"):
        DynamicLayerSelection(torch.optim.AdamW(norms(model)), model, score="adapter")
    train(model, first, batch, 2)
    assert len(first.history) == 1


def shared_rosa(make_model):
    model = make_model(hidden_size=16)
    model.model.layers[1].self_attn = model.model.layers[0].self_attn
    return rosa.patch(model, rosa.RosaConfig(rank=4)), "layers.0.self_attn.roae"


def shared_lora(make_model):
    model = make_model(hidden_size=16)
    model.model.layers[1].mlp = model.model.layers[0].mlp
    return get_peft_model(model, LoraConfig(r=2, target_modules=["up_proj"])), "layers.0.mlp.up_proj.lora_B"


def shared_norms(make_model):
    model = make_model(hidden_size=16)
    model.model.layers[1] = model.model.layers[0]
    return model, "layers.0"


@pytest.mark.parametrize("make", [shared_rosa, shared_lora, shared_norms])
@pytest.mark.parametrize("score", ["norms", "adapter"])
def test_what_two_layers_share_trains_whenever_one_of_them_is_selected(make_model, batch, make, score):
    ends = {}
    for mode in ("mask", "skip"):
        model, shared = make(make_model)
        model.config.use_cache = False  # a cache has a place for each attention
        adamw = torch.optim.AdamW(rosa.trainable_parameters(model.train()), lr=1e-2)
        optimizer = DynamicLayerSelection(
            adamw, model, interval=2, k_ratio=0.25, p_exploit=0.0, mode=mode, score=score, seed=3
        )
        assert optimizer.layers == (0, 1, 2, 3)
        for step in range(14):
            before = values(model)
            backward(model, batch)
            optimizer.step()
            optimizer.zero_grad()
            moved = [not torch.equal(p, before[n]) for n, p in model.named_parameters() if shared in n]
            trains = bool({0, 1} & {*optimizer.selected_layers})
            assert moved and all(m == trains for m in moved), step
        assert {s.layers for s in optimizer.history} == {(0,), (1,), (2,), (3,)}
        ends[mode] = values(model), optimizer.history
    assert equal(ends["mask"][0], ends["skip"][0]) and ends["mask"][1] == ends["skip"][1]


def test_a_model_with_layer_selection_is_pickled_and_copied_without_it(make_patched, batch):
    model = make_patched().eval()
    optimizer = wrap(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (torch.load(file, weights_only=False), copy.deepcopy(model)):
        assert torch.equal(twin(**batch).logits, model(**batch).logits)
        optimizer._freezing.forward_seen = False
        twin(**batch)
        assert not optimizer._freezing.forward_seen


def test_zero_grad_clears_norms_that_serve_the_score_alone(make_patched, batch):
    model = make_patched(config=rosa.RosaConfig(rank=4, train_norms=False)).train()
    optimizer = wrap(model, interval=1)
    backward(model, batch)
    assert model.model.layers[0].input_layernorm.weight.grad is not None
    optimizer.zero_grad()  # as after a step that GradScaler skipped
    assert all(p.grad is None for p in model.parameters())


def test_layers_are_numbered_as_in_the_model_where_only_some_take_part(make_patched, batch):
    model = make_patched(config=rosa.RosaConfig(rank=4, layers=(2, 3))).train()
    optimizer = wrap(model, interval=1)
    train(model, optimizer, batch, 3)
    assert optimizer.layers == (2, 3) and optimizer.num_layers == len(optimizer.scores) == 2
    assert all(set(s.layers) < {2, 3} for s in optimizer.history)


def test_a_deep_copy_of_the_optimizer(make_patched, batch):
    model = make_patched().train()
    optimizer = wrap(model)
    train(model, optimizer, batch, 6)
    twin = copy.deepcopy(optimizer)
    assert twin.history == optimizer.history and twin.selected_layers == optimizer.selected_layers


def test_a_pickle_of_the_optimizer_keeps_its_course_and_leaves_the_model_behind(make_patched, batch):
    model = make_patched().train()
    optimizer = wrap(model)
    train(model, optimizer, batch, 6)
    twin = pickle.loads(pickle.dumps(optimizer))
    assert (twin.history, twin.k, twin.interval, twin.mode) == (optimizer.history, 2, 5, "skip")
    assert twin._freezing.model is None and twin._freezing.optimizer is twin.optimizer
    assert twin.state_dict()["layer_selection"]["step"] == 6


def test_what_is_set_on_it_counts_from_the_next_step_on(make_patched, batch):
    model = make_patched().train()
    optimizer = wrap(model, mode="mask", interval=100)
    train(model, optimizer, batch, 2)
    optimizer.interval, optimizer.p_exploit, optimizer.k = 1, 1.0, 3
    train(model, optimizer, batch, 1)
    (made,) = optimizer.history
    assert (made.step, made.exploited, len(made.layers)) == (3, True, 3)
    optimizer.interval, optimizer.selected_layers = 100, (1,)
    backward(model, batch)
    assert [layer.self_attn.roae.up.grad is not None for layer in model.model.layers] == [False, True, False, False]


def test_gpt2_has_layers_too():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=16, n_layer=4, n_head=2, n_positions=32))
    assert DynamicLayerSelection(torch.optim.SGD(model.parameters(), lr=0.1), model).num_layers == 4


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(k_ratio=0), ValueError, r"k_ratio must lie in \(0, 1\], got 0"),
        (dict(k_ratio=1.5), ValueError, r"k_ratio must lie in \(0, 1\], got 1.5"),
        (dict(interval=0), ValueError, "interval must be at least 1 step, got 0"),
        (dict(interval=2.5), TypeError, "interval must be an int, got 2.5"),
        (dict(warmup_steps=-1), ValueError, "warmup_steps must be at least 0, got -1"),
        (dict(p_exploit=1.01), ValueError, r"p_exploit must lie in \[0, 1\], got 1.01"),
        (dict(mode="drop"), ValueError, "mode must be one of skip, mask, got 'drop'"),
        (dict(score="loss"), ValueError, "score must be one of norms, adapter, got 'loss'"),
        (dict(seed=None), TypeError, "seed must be an int, got None"),
        (dict(seed=2**64), ValueError, r"seed must lie in -2\*\*63 to 2\*\*64 - 1, got 18446744073709551616"),
        (dict(seed=-(2**63) - 1), ValueError, r"seed must lie in -2\*\*63 to 2\*\*64 - 1, got -9223372036854775809"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_frozen(make_patched, options, error, message):
    model = make_patched()
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=message):
        wrap(model, **options)
    assert [p.requires_grad for p in model.parameters()] == flags


def test_an_optimizer_of_other_parameters_is_refused(make_patched):
    model = make_patched()
    strangers = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match="holds no parameter of the model's decoder layers.*trainable_parameters"):
        DynamicLayerSelection(strangers, model)
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got list"):
        DynamicLayerSelection(list(model.parameters()), model)
    with pytest.raises(TypeError, match="DynamicLayerSelection already"):
        DynamicLayerSelection(wrap(model), model)


def test_an_optimizer_that_accelerate_has_prepared_is_refused(make_patched):
    model = make_patched()
    prepared = Accelerator(cpu=True).prepare(torch.optim.SGD(rosa.trainable_parameters(model), lr=0.1))
    with pytest.raises(TypeError, match="SGD first, and hand this to `accelerator.prepare`"):
        DynamicLayerSelection(prepared, model)


def test_a_model_without_decoder_layers_is_refused():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(rosa.UnsupportedModelError, match="Linear has no decoder layers"):
        DynamicLayerSelection(torch.optim.SGD(model.parameters(), lr=0.1), model)


def test_states_that_do_not_fit_are_refused_and_change_nothing(make_patched, batch):
    model = make_patched().train()
    optimizer = wrap(model)
    train(model, optimizer, batch, 6)
    with pytest.raises(ValueError, match=r"no 'layer_selection'.*Load it into `.optimizer`"):
        optimizer.load_state_dict(optimizer.optimizer.state_dict())
    with pytest.raises(ValueError, match="selects among 2 layers, the model has 4"):
        optimizer.load_state_dict(wrap(make_patched(num_hidden_layers=2)).state_dict())
    upper = wrap(make_patched(config=rosa.RosaConfig(rank=4, layers=(2, 3))))
    lower = wrap(make_patched(config=rosa.RosaConfig(rank=4, layers=(0, 1)))).state_dict()
    with pytest.raises(ValueError, match=r"selects among layers \[0, 1\], and the optimizer holds layers \[2, 3\]"):
        upper.load_state_dict(lower)
    assert len(optimizer.history) == 1 and upper.selected_layers == (2, 3)


def test_a_state_from_before_it_named_its_layers_loads(make_patched, batch):
    model = make_patched().train()
    optimizer = wrap(model)
    train(model, optimizer, batch, 6)
    state = optimizer.state_dict()
    del state["layer_selection"]["layers"]
    other = wrap(make_patched())
    other.load_state_dict(state)
    assert other.history == optimizer.history


def test_a_selection_from_broken_or_missing_gradients_changes_nothing(make_patched, batch):
    model = make_patched().train()
    optimizer = wrap(model, interval=1)
    with pytest.raises(RuntimeError, match="step 1 selects layers, but no norm has a gradient"):
        optimizer.step()
    backward(model, batch)
    model.model.layers[2].input_layernorm.weight.grad[0] = float("nan")
    before = values(model)
    with pytest.raises(FloatingPointError, match="gradients of layer 2's norms are not finite at step 1"):
        optimizer.step()
    assert equal(before, values(model)) and optimizer.history == [] and not optimizer.state
