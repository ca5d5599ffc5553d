"""torch.compile: patched models and single layers in one graph and equal to eager, and few graphs for all layers."""

import copy
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import TrainingArguments

import rosa
from rosa.selection import freezing


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture(
    params=[
        pytest.param(("cpu", "reference"), id="reference"),
        pytest.param(
            ("cpu", "triton"),
            id="interpreter",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs these tests"),
        ),
        pytest.param(("cuda", "triton"), id="cuda", marks=pytest.mark.gpu),
    ]
)
def device(request, monkeypatch):
    """Where the layer runs, with the backend of the kernels set."""
    device, backend = request.param
    monkeypatch.setenv("ROSA_BACKEND", backend)
    return device


def gradients(model, inputs, call):
    model.zero_grad()
    call(**inputs).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


# One family goes through the whole compiler, which takes long; the graph that it is given is the same question.
@pytest.mark.parametrize(
    ("family", "backend"),
    [*((name, "aot_eager") for name in ("llama", "qwen2", "qwen3", "gemma2", "mistral")), ("qwen2", "inductor")],
)
def test_a_model_in_one_graph_has_equal_gradients(family, backend, make_patched, batch):
    # Wide weights, without which RoAE's gradients would be smaller than any tolerance.
    model = make_patched(family, num_hidden_layers=2, initializer_range=0.3).train()
    eager = gradients(model, batch, model)
    compiled = gradients(model, batch, torch.compile(model, fullgraph=True, backend=backend))
    assert compiled.keys() == eager.keys()
    for name in eager:
        assert (compiled[name] - eager[name]).norm() < 1e-4 * eager[name].norm(), name


@pytest.mark.parametrize("family", ["qwen2", "gemma2"], indirect=True)
def test_inference_and_generation_in_one_graph(family, make_patched, batch):
    model = make_patched(family, num_hidden_layers=2, initializer_range=0.1).eval()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    options = dict(inputs, max_new_tokens=4, do_sample=False, cache_implementation="static")
    graphs = CompileCounterWithBackend("eager")
    with torch.no_grad():
        logits, generated = model(**inputs).logits, model.generate(**options)
        compiled = torch.compile(model, fullgraph=True, backend=graphs)
        torch.testing.assert_close(compiled(**inputs).logits, logits)
        assert graphs.frame_count == 1
        model.forward = torch.compile(model.forward, fullgraph=True, backend=graphs)
        assert torch.equal(model.generate(**options), generated)
        assert graphs.frame_count > 1


def layer_inputs(model, device, batch=2, seq=7):
    """A decoder layer's input that requires gradients, and its other arguments, as the model gives them."""
    dtype = model.lm_head.weight.dtype
    generator = torch.Generator().manual_seed(batch * seq)
    hidden_states = torch.randn(batch, seq, 32, generator=generator).to(device, dtype).requires_grad_()
    positions = torch.arange(seq, device=device)[None]
    return hidden_states, dict(position_embeddings=model.model.rotary_emb(hidden_states, positions))


def layer_pass(layer, hidden_states, others):
    """The layer's output, and the gradients of its input and of all that trains in it."""
    wanted = [hidden_states, *(p for p in layer.parameters() if p.requires_grad)]
    output = layer(hidden_states, **others)
    return output, *torch.autograd.grad(output.float().square().sum(), wanted)


@pytest.mark.parametrize(
    ("key_heads", "dtype", "trains"),
    [(2, torch.float32, True), (2, torch.bfloat16, True), (4, torch.bfloat16, True), (4, torch.float32, False)],
    ids=["grouped", "grouped, bfloat16", "ungrouped, bfloat16", "ungrouped, frozen"],
)
def test_a_layer_in_one_graph_agrees_with_eager(make_patched, device, key_heads, dtype, trains):
    model = make_patched(num_hidden_layers=1, num_key_value_heads=key_heads, dtype=dtype).to(device).train()
    layer, inputs = model.model.layers[0], layer_inputs(model, device)
    if not trains:
        layer.requires_grad_(False)
    eager = layer_pass(layer, *inputs)
    layer.compile(fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(layer_pass(layer, *inputs), eager, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_a_layer_goes_through_the_whole_compiler(make_patched, kernel_device, monkeypatch, dtype):
    monkeypatch.setenv("ROSA_BACKEND", "triton")
    model = make_patched(num_hidden_layers=1, dtype=dtype).to(kernel_device).train()
    layer, inputs = model.model.layers[0], layer_inputs(model, kernel_device)
    eager = layer_pass(layer, *inputs)
    layer.compile(fullgraph=True)
    for ours, theirs in zip(layer_pass(layer, *inputs), eager, strict=True):
        assert (ours - theirs).norm() < {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype] * theirs.norm()


def test_batch_and_sequence_may_change_with_one_graph_more(make_patched, device):
    model = make_patched(num_hidden_layers=1).to(device).train()
    layer, graphs = model.model.layers[0], CompileCounterWithBackend("aot_eager")
    compiled = copy.deepcopy(layer)
    compiled.compile(fullgraph=True, backend=graphs)
    for batch, seq in ((2, 7), (3, 9), (4, 5), (2, 33)):
        inputs = layer_inputs(model, device, batch, seq)
        for ours, theirs in zip(layer_pass(compiled, *inputs), layer_pass(layer, *inputs), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert graphs.frame_count == 2


def train(model, batch, call, *, steps=40, **options):
    """Some steps with a selection every other one; returns the layers of each."""
    adamw = torch.optim.AdamW(rosa.trainable_parameters(model), lr=1e-2)
    optimizer = rosa.DynamicLayerSelection(adamw, model, interval=2, p_exploit=0.3, **options)
    for _ in range(steps):
        call(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [made.layers for made in optimizer.history]


def test_four_graphs_serve_all_layers_and_selections(make_patched, batch):
    eager, model = (make_patched(num_hidden_layers=6).train() for _ in range(2))
    graphs = CompileCounterWithBackend("aot_eager")
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend=graphs)
    selections = train(model, batch, model)
    assert len(selections) == 20 and len(set(selections)) > 8
    assert graphs.frame_count == 4  # the layer trains or not, and its input requires gradients or not
    assert selections == train(eager, batch, eager)
    for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_model_compiled_as_a_whole_warns_of_skip_once(make_patched, batch):
    freezing._warn_once.cache_clear()
    model, graphs = make_patched(num_hidden_layers=2).train(), CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    with pytest.warns(UserWarning, match=r"compiled as a whole.*layer.compile\(\).*mode='mask'") as caught:
        selections = train(model, batch, compiled, steps=6)
    assert len([w for w in caught if "compiled as a whole" in str(w.message)]) == 1
    assert graphs.frame_count == 1 + len(set(selections))


@pytest.mark.parametrize("mode", ["mask", "skip, the optimizer gone"])
def test_nothing_is_said_where_nothing_is_frozen_and_one_graph_does(make_patched, batch, mode):
    freezing._warn_once.cache_clear()
    model, graphs = make_patched(num_hidden_layers=2).train(), CompileCounterWithBackend("eager")
    if mode != "mask":
        train(model, batch, model, steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, batch, torch.compile(model, backend=graphs), steps=6, mode="mask")
    assert graphs.frame_count == 1


def rows(count):
    """Rows of several lengths, so that some batches have padding and some have none."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 96, (9 + i % 5,), generator=generator) for i in range(count)]


def pad(batch):
    ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids.masked_fill(ids == 0, -100)}


@pytest.mark.parametrize("mode", ["skip", "mask"])
def test_a_compiled_training_takes_the_same_course_and_never_gives_up(make_patched, tmp_path, mode):
    def train(**options):
        arguments = TrainingArguments(
            str(tmp_path), max_steps=40, per_device_train_batch_size=2, report_to=[], disable_tqdm=True, use_cpu=True,
            save_strategy="no", **options,
        )  # fmt: skip
        model, dls = make_patched(num_hidden_layers=3), dict(interval=2, p_exploit=0.3, mode=mode)
        trainer = rosa.RosaTrainer(model, arguments, dls=dls, train_dataset=rows(64), data_collator=pad)
        trainer.train()
        return trainer

    limit, eager = torch._dynamo.config.recompile_limit, train()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*compiled as a whole")
        freezing._warn_once.cache_clear()
        compiled = train(torch_compile=True, torch_compile_backend="eager")
    frames = torch._dynamo.utils.counters["frames"]
    assert frames["ok"] == frames["total"] and torch._dynamo.config.recompile_limit == limit
    # Batches of one length or another, with padding or without: four times as many graphs where layers freeze.
    assert frames["ok"] > limit if mode == "skip" else frames["ok"] == 2
    assert len({made.layers for made in compiled.layer_selection.history}) == 3
    assert compiled.layer_selection.history == eager.layer_selection.history
    for ours, theirs in zip(compiled.model.parameters(), eager.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
