"""`rosa chat`, `generate`, `evaluate` and `push` on an adapter alone: they find its base and how it is asked."""

import datetime
import io
import json
import os
import pty
import select
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import peft
import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

import rosa
from rosa.cli import main
from rosa.data.prompt_form import CHAT, INSTRUCTION, PLAIN, save_form
from rosa.data.prompts import chat_ids, prompt, question_ids
from rosa.data.tokens import tokenize
from rosa.evaluation.generation import answer
from rosa.evaluation.questions import question
from rosa.storage.output import check_output

from .tiny_qwen2 import TAUGHT, taught_to_chat, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}<assistant>"
ASK, SING = "Are you there?", "Sing."
SONG = " ".join(["la"] * 400)  # cut off before it ends, so that nothing teaches to end it
LONG = ["--max-new-tokens", "100000"]


def learn(model, tokenizer, rows, *, steps, rate):
    """A few steps on the rows, in the paper's prompt."""
    batch = DataCollatorForSeq2Seq(tokenizer)([dict(e) for e in tokenize(rows, tokenizer, max_length=120)])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base that says yes and sings without end, and adapters of it: `no` says no, `same` is the base."""
    folder = tmp_path_factory.mktemp("using")
    rows = [(ASK, "yes it is"), ("Are you gone?", "no it is not"), (SING, SONG)]
    known = [{"instruction": instruction, "output": output} for instruction, output in rows]
    no = [{"instruction": ASK, "output": "no it is not"}]
    texts = [prompt(row["instruction"]) + row["output"] for row in known]
    tokenizer = tiny_tokenizer(texts, vocab_size=400)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "base")
    torch.manual_seed(0)
    learn(tiny_model(len(tokenizer)), tokenizer, known, steps=60, rate=3e-3).save_pretrained(folder / "base")
    for name, steps in (("no", 20), ("same", 0)):
        model = rosa.patch(AutoModelForCausalLM.from_pretrained(folder / "base"), rosa.RoadConfig())
        rosa.save_adapter(learn(model, tokenizer, no, steps=steps, rate=1e-2), folder / name)
    return folder


@pytest.fixture(scope="module")
def used(folder):
    return rosa.load(folder / "no")


@pytest.fixture
def in_form(folder, tmp_path):
    """Copies the adapter `no` as one whose rows had another form."""

    def copy(form):
        out = Path(shutil.copytree(folder / "no", tmp_path / form))
        save_form(out, form)
        return out

    return copy


def printed(capsys, *args, stdin=None, monkeypatch=None):
    if stdin is not None:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    capsys.readouterr()
    main([str(arg) for arg in args])
    return capsys.readouterr().out


def error_of(capsys, *args, code=1):
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main([str(arg) for arg in args])
    assert exit.value.code == code
    return capsys.readouterr().err.strip().splitlines()[-1]


# Chat


class Terminal:
    """A process in a pseudo-terminal of 80 columns."""

    def __init__(self, *args):
        environment = {**os.environ, "TERM": "dumb", "COLUMNS": "80", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        environment.pop("TRITON_INTERPRET", None)
        self.pid, self.file = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # as in a terminal: jobs in the background have it ignored
            os.execve(sys.executable, [sys.executable, "-m", "rosa", *map(str, args)], environment)

    def until(self, mark):
        """What comes on the screen up to a mark."""
        text = b""
        while mark.encode() not in text:
            assert select.select([self.file], [], [], 120)[0], text.decode(errors="replace")
            text += os.read(self.file, 1)
        return text.decode(errors="replace").replace("\r\n", "\n")

    def type(self, text):
        os.write(self.file, text.encode())

    def interrupt(self, mark):
        """What comes up to a mark after Ctrl-C, which is typed again where nothing comes: between the writing of a
        prompt and the wait for a line Python would take note of it with the next key alone."""
        self.type("\x03")
        while not select.select([self.file], [], [], 20)[0]:
            self.type("\x03")
        return self.until(mark)

    def ask(self, line):
        """What is said after a line, up to the next prompt."""
        self.type(f"{line}\r")
        self.until("\n")
        return self.until(">>> ").removesuffix(">>> ").strip()

    def end(self):
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_a_conversation_in_a_terminal(folder):
    terminal = Terminal("chat", "--adapters", f"no={folder / 'no'},same={folder / 'same'}", *LONG)
    start = terminal.until(">>> ")
    assert f"base     {folder / 'base'}\nadapter  no, same\nIt is asked in the paper's prompt, as it was" in start
    assert terminal.ask("/base") == "nothing was asked yet"
    assert terminal.ask(ASK) == "no it is not"
    assert terminal.ask("/base") == "yes it is"
    assert terminal.ask("/adapter") == "[no]  same"
    assert terminal.ask("/adapter other") == "there is no adapter other, only no, same"
    assert terminal.ask("/adapter same").endswith("no  [same]")
    assert terminal.ask(ASK) == "yes it is"
    # Ctrl-C stops an answer and no more.
    terminal.type(f"{SING}\r")
    terminal.until("la la")
    assert "Ctrl-D" not in terminal.interrupt(">>> ")
    assert terminal.ask(ASK) == "yes it is"
    assert "Ctrl-D or /quit ends." in terminal.interrupt(">>> ")
    assert terminal.ask("/sing") == "there is no command /sing: /help shows those there are"
    commands = terminal.ask("/help")
    assert "/reset" in commands and all(len(line) <= 80 for line in commands.splitlines())
    assert terminal.ask("/reset") == "The conversation is forgotten."
    terminal.type("\x04")
    assert terminal.end() == 0


def test_in_a_pipe_the_answer_alone_is_printed(folder, tmp_path):
    (tmp_path / "question").write_text(f"{ASK}\n")
    command = f"{sys.executable} -m rosa chat --adapter {folder}/no < {tmp_path}/question > {tmp_path}/answer"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", command], environment)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert (tmp_path / "answer").read_bytes() == b"no it is not\n"


class Typed(io.StringIO):
    """What is typed at a terminal, while what is printed goes elsewhere."""

    def isatty(self):
        return True


@pytest.mark.parametrize("form", [CHAT, PLAIN])
def test_an_adapter_of_peft_is_talked_to_likewise_and_silenced(folder, form, tmp_path, capsys, monkeypatch):
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    asked = [question_ids(form, tokenizer, ASK)]
    expected = answer(base, tokenizer, asked, max_new_tokens=6)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj"]))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    save_form(tmp_path, form)
    expected = answer(model, tokenizer, asked, max_new_tokens=6) + expected
    assert expected[0] != expected[1]
    monkeypatch.setattr(sys, "stdin", Typed(f"{ASK}\n/base\n/base {SING}\n/adapter\n/reset\n/base\n"))
    main(["chat", "--adapter", str(tmp_path), "--max-new-tokens", "6"])
    printed = capsys.readouterr()
    assert printed.out == "".join(f"{text}\n" for text in expected)
    assert ("continued as it stands, without history" in printed.err) == (form == PLAIN)
    assert "/base takes nothing after it, got 'Sing.': /help shows what it does\n" in printed.err
    assert "there is nothing to switch" in printed.err and "nothing was asked yet" in printed.err


def test_chat_asks_in_the_adapters_form(folder, used, in_form, capsys, monkeypatch):
    model, tokenizer = used
    for form in (INSTRUCTION, CHAT, PLAIN):
        expected = answer(model, tokenizer, [question_ids(form, tokenizer, "there? Sing")], max_new_tokens=6)[0]
        args = ["chat", "--adapter", in_form(form), "--max-new-tokens", 6, "--temperature", 0]
        assert printed(capsys, *args, stdin=" there? Sing\n", monkeypatch=monkeypatch) == f"{expected}\n"


def test_chat_with_the_bare_model_goes_by_its_chat_template(folder, capsys, monkeypatch):
    model, tokenizer = (kind.from_pretrained(folder / "base") for kind in (AutoModelForCausalLM, AutoTokenizer))
    turns = [{"role": "system", "content": "Sing."}, {"role": "user", "content": ASK}]
    expected = answer(model, tokenizer, [chat_ids(turns, tokenizer)], max_new_tokens=6)[0]
    args = ["chat", "--model", folder / "base", "--system", "Sing.", "--max-new-tokens", 6]
    assert printed(capsys, *args, stdin=ASK, monkeypatch=monkeypatch) == f"{expected}\n"


@pytest.mark.parametrize(
    ("args", "message", "code"),
    [
        ([], "one of the arguments --model --adapter is required", 2),
        (["--adapter", "a", "--adapters", "b"], "not allowed with argument", 2),
        (["--adapters", "v1.2"], "a name is letters, digits, '_' and '-', not 'v1.2'", 2),
        (["--model", "m", "--max-new-tokens", "0"], "--max-new-tokens: must be at least 1, got 0", 2),
        (["--model", "m", "--temperature", "-1"], "--temperature: must be a number from 0, got -1", 2),
        (["--model", "m", "--temperature", "nan"], "--temperature: must be a number from 0, got nan", 2),
        (["--adapter", "nowhere"], "there is no adapter folder nowhere", 1),
    ],
)
def test_wrong_arguments_of_chat_are_told(args, message, code, capsys):
    assert message in error_of(capsys, "chat", *args, code=code)


def test_chat_tells_what_does_not_go_together(folder, in_form, tmp_path, capsys, monkeypatch):
    error = error_of(capsys, "chat", "--adapter", folder / "no", "--system", "Sing.")
    assert "--system is for the chat template" in error
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
    assert "no question on the standard input" in error_of(capsys, "chat", "--adapter", folder / "no")
    bare = shutil.copytree(folder / "base", tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    monkeypatch.setattr(sys, "stdin", io.StringIO(ASK))
    error = error_of(capsys, "chat", "--adapter", in_form(CHAT), "--model", bare)
    assert f"the tokenizer of {bare} has no chat template" in error
    error = error_of(capsys, "chat", "--adapter", bare)
    assert f"{bare} holds a model (model.safetensors) and no adapter: give it as --model" in error


# Generate and evaluate


def test_an_adapter_that_learnt_conversations_stops_where_it_was_taught_to(tmp_path, capsys, monkeypatch):
    model, tokenizer = taught_to_chat()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    model = rosa.patch(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), rosa.RoadConfig())
    rosa.save_adapter(model, tmp_path / "out")
    save_form(tmp_path / "out", CHAT)
    ((asked, said), *_), adapter = TAUGHT, ["--adapter", tmp_path / "out"]
    assert printed(capsys, "generate", *adapter, "--instruction", asked, "--max-new-tokens", 12) == f"{said}\n"
    args = ["chat", *adapter, "--max-new-tokens", 12]
    assert printed(capsys, *args, stdin=asked, monkeypatch=monkeypatch) == f"{said}\n"
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": asked}]}))
    args = ["generate", "--model", tmp_path / "base", "--data", tmp_path / "rows.jsonl", "--max-new-tokens", 12]
    assert json.loads(printed(capsys, *args))["prediction"] == said  # a bare model, asked by its chat template


def test_generate_finds_the_base_and_asks_in_the_form(folder, used, in_form, capsys):
    model, tokenizer = used
    args = ["generate", "--max-new-tokens", 6, "--instruction", ASK]
    assert printed(capsys, *args, "--adapter", folder / "no") == "no it is not\n"
    expected = answer(model, tokenizer, [question_ids(CHAT, tokenizer, ASK)], max_new_tokens=6)[0]
    assert printed(capsys, *args, "--adapter", in_form(CHAT)) == f"{expected}\n"


def test_generate_answers_files_of_all_kinds(folder, used, in_form, tmp_path, capsys):
    model, tokenizer = used
    turns = [{"role": r, "content": c} for r, c in (("user", ASK), ("assistant", "yes"), ("user", SING))]
    rows = [{"instruction": ASK}, {"prompt": "Are you"}, {"messages": turns}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = [question_ids(CHAT, tokenizer, ASK), "Are you", chat_ids(turns, tokenizer)]
    expected = answer(model, tokenizer, asked, max_new_tokens=6)
    args = ["generate", "--max-new-tokens", 6, "--data"]
    adapter = in_form(CHAT)
    lines = printed(capsys, *args, tmp_path / "rows.jsonl", "--adapter", adapter).splitlines()
    assert [json.loads(line)["prediction"] for line in lines] == expected
    assert json.loads(lines[2]) == {**rows[2], "prediction": expected[2]}
    error = error_of(capsys, *args, tmp_path / "rows.jsonl", "--adapter", folder / "no")
    assert "rows.jsonl, row 2: there are 3 turns up to the user's last, and the adapter, whose prompts" in error


def test_generate_asks_the_lines_of_a_text_as_questions_and_continues_prompts(folder, used, in_form, tmp_path, capsys):
    model, tokenizer = used
    lines, args = tmp_path / "lines.txt", ["generate", "--max-new-tokens", 6, "--data"]
    lines.write_text(f"{ASK}\n\n")
    for form in (CHAT, PLAIN):
        expected = answer(model, tokenizer, [question_ids(form, tokenizer, ASK)], max_new_tokens=6)[0]
        main([str(arg) for arg in (*args, lines, "--adapter", in_form(form))])
        told = capsys.readouterr()
        field = {"prompt": ASK} if form == PLAIN else {"instruction": ASK, "input": ""}
        assert json.loads(told.out) == {**field, "prediction": expected} and "as they are" not in told.err
    bare = AutoModelForCausalLM.from_pretrained(folder / "base")
    found = json.loads(printed(capsys, *args, lines, "--model", folder / "base"))
    assert found == {"prompt": ASK, "prediction": answer(bare, tokenizer, [ASK], max_new_tokens=6)[0]}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps({'prompt': ASK})}\n" * 2)
    for adapter, times in ((tmp_path / CHAT, 1), (folder / "no", 0)):
        main([str(arg) for arg in (*args, tmp_path / "rows.jsonl", "--adapter", adapter)])
        assert capsys.readouterr().err.count("prompts are continued as they are; this adapter was") == times


def test_generate_asks_the_rows_that_one_trained_on_again(used, in_form, tmp_path, capsys):
    model, tokenizer = used
    first, answered = {"from": "human", "value": ASK}, {"from": "gpt", "value": "yes"}
    rows = [
        {"messages": [{"role": "user", "content": ASK}, {"role": "assistant", "content": "yes"}]},
        {"conversations": [first, answered]},
        {"prompt": [{"role": "user", "content": ASK}], "completion": [{"role": "assistant", "content": "yes"}]},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    expected = answer(model, tokenizer, [question_ids(CHAT, tokenizer, ASK)], max_new_tokens=6)[0]
    args = ["generate", "--max-new-tokens", 6, "--data", tmp_path / "rows.jsonl", "--adapter", in_form(CHAT)]
    found = [json.loads(line) for line in printed(capsys, *args).splitlines()]
    assert found == [{**row, "prediction": expected} for row in rows]


def test_the_folder_of_generates_output_is_made_or_told_before_the_model_is_loaded(folder, tmp_path, capsys):
    (tmp_path / "lines.txt").write_text(ASK)
    args = ["generate", "--data", tmp_path / "lines.txt", "--max-new-tokens", 2]
    printed(capsys, *args, "--model", folder / "base", "--output", tmp_path / "new" / "folder" / "a.jsonl")
    assert json.loads((tmp_path / "new" / "folder" / "a.jsonl").read_text())["prompt"] == ASK
    output = tmp_path / "lines.txt" / "new" / "a.jsonl"
    error = error_of(capsys, *args, "--model", "no/such/model", "--output", output)
    assert f"--output {output} cannot be made, as {tmp_path / 'lines.txt'} is not a folder" in error
    error = error_of(capsys, *args, "--model", "no/such/model", "--output", tmp_path / "other" / "a.jsonl")
    assert "no/such/model" in error and not (tmp_path / "other").exists()


def test_a_folder_that_may_not_be_written_into_is_told():
    with tempfile.TemporaryDirectory() as folder:  # not pytest's, which other users cannot enter
        os.chmod(folder, 0o555)
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                if os.getuid() == 0:
                    os.setuid(65534)  # root may write anywhere, and gives that away
                check_output(Path(folder) / "out")
            except ValueError as error:
                os.write(writer, str(error).encode())
            finally:  # whatever it was, no second pytest goes on from here
                os._exit(0)
        os.close(writer)
        assert os.waitpid(pid, 0)[1] == 0
        with open(reader) as told:
            fault = f"--output {folder}/out cannot be written, as nothing may be written into {folder}"
            assert told.read() == f"{fault}: choose another place"


def test_generate_asks_each_row_in_the_form_of_its_own_adapter(folder, used, in_form, tmp_path, capsys):
    model, tokenizer = used
    (tmp_path / "rows.json").write_text(json.dumps([{"instruction": ASK, "adapter": name} for name in ("no", "chat")]))
    adapters = f"no={folder / 'no'},chat={in_form(CHAT)}"
    args = ["--data", tmp_path / "rows.json", "--adapters", adapters, "--max-new-tokens", 6]
    found = [json.loads(line)["prediction"] for line in printed(capsys, "generate", *args).splitlines()]
    asked = [question_ids(form, tokenizer, ASK) for form in (INSTRUCTION, CHAT)]
    assert found == answer(model, tokenizer, asked, max_new_tokens=6) and found[0] == "no it is not"


def test_generate_answers_rows_of_tables(folder, used, tmp_path, capsys):
    bare = AutoModelForCausalLM.from_pretrained(folder / "base")
    (tmp_path / "rows.csv").write_text(f"instruction,adapter\n{ASK},no\n{ASK},\n")
    args = ["generate", "--max-new-tokens", 6, "--data"]
    named = printed(capsys, *args, tmp_path / "rows.csv", "--adapters", f"no={folder / 'no'}").splitlines()
    found = [json.loads(line) for line in named]
    assert [row["adapter"] for row in found] == ["no", None]
    base = answer(bare, used[1], [question({"instruction": ASK, "input": ""}, None, used[1])], max_new_tokens=6)[0]
    assert [row["prediction"] for row in found] == ["no it is not", base]
    day = datetime.date(2026, 1, 2)
    pyarrow.parquet.write_table(pyarrow.table({"instruction": [ASK], "day": [day]}), tmp_path / "rows.parquet")
    row = json.loads(printed(capsys, *args, tmp_path / "rows.parquet", "--adapter", folder / "no"))
    assert (row["day"], row["prediction"]) == ("2026-01-02", "no it is not")


def test_adapters_are_named_before_the_first_sign_and_peft_s_are_given_alone(folder, used, tmp_path, capsys):
    shutil.copytree(folder / "no", tmp_path / "lr=0.1")
    (tmp_path / "rows.json").write_text(json.dumps([{"instruction": ASK, "adapter": "no"}]))
    args = ["generate", "--data", tmp_path / "rows.json", "--max-new-tokens", 6, "--adapters"]
    assert json.loads(printed(capsys, *args, f"no={tmp_path / 'lr=0.1'}"))["prediction"] == "no it is not"
    lora = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), peft.LoraConfig(r=2))
    lora.save_pretrained(tmp_path / "lora")
    error = error_of(capsys, *args, f"no={folder / 'no'},{tmp_path / 'lora'}")
    assert "lora holds an adapter of peft's, of type 'LORA': several at once are RoSA's and RoAd's; give it" in error


def test_a_base_that_is_not_there_is_told_with_what_to_do(folder, tmp_path, capsys):
    moved = shutil.copytree(folder / "base", tmp_path / "base")
    model = rosa.patch(AutoModelForCausalLM.from_pretrained(moved), rosa.RoadConfig())
    rosa.save_adapter(model, tmp_path / "out")
    shutil.rmtree(moved)
    args = ["generate", "--prompt", "Are", "--adapter", tmp_path / "out", "--max-new-tokens", 2]
    error = error_of(capsys, *args)
    assert f"there is no folder {moved} to load" in error and "--model on the command line" in error
    assert printed(capsys, *args, "--model", folder / "base")


def test_evaluate_asks_in_the_adapters_form_and_says_so_to_a_run_that_goes_on(folder, in_form, tmp_path, capsys):
    (tmp_path / "words").mkdir()
    rows = [{"instruction": ASK, "input": "", "answer": "no it is not"}]
    (tmp_path / "words" / "test.json").write_text(json.dumps(rows))
    (tmp_path / "words" / "task.json").write_text('{"answer": "text"}')
    args = ["evaluate", "--tasks", "words", "--data-dir", tmp_path, "--max-new-tokens", 6]
    printed(capsys, *args, "--adapter", folder / "no", "--output", tmp_path / "found")
    results = json.loads((tmp_path / "found" / "results.json").read_text())
    assert results["tasks"]["words"]["correct"] == 1 and results["model"] == str(folder / "base")
    made = json.loads((tmp_path / "found" / "predictions" / "words.made_with.json").read_text())
    # The digest of an adapter in the paper's prompt is what it was before there were other forms.
    assert made["prompt"] == "7b7e96e6470b6bc0"
    error = error_of(capsys, *args, "--adapter", in_form(CHAT), "--output", tmp_path / "found")
    assert "prompt was" in error and "model was" not in error
    printed(capsys, *args, "--adapter", tmp_path / CHAT, "--output", tmp_path / "other")
    assert json.loads((tmp_path / "other" / "results.json").read_text())["tasks"]["words"]["correct"] == 0
    assert "one of the arguments --model --adapter is required" in error_of(capsys, *args, code=2)


# Push


@pytest.mark.parametrize(
    ("args", "message", "code"),
    [
        (["a"], "the following arguments are required: USER/NAME", 2),
        (["a", "name"], "argument USER/NAME: must be the name of a repository, user/name, got name", 2),
        (["a", "me/name", "--create-pr", "--revision", "x"], "--create-pr: not allowed with argument --revision", 2),
        (["a", "me/no name"], "Repo id must use alphanumeric chars", 1),
        (["nowhere", "me/name"], "there is no adapter folder nowhere", 1),
    ],
)
def test_wrong_arguments_of_push_are_told(args, message, code, capsys):
    assert message in error_of(capsys, "push", *args, code=code)


def test_push_refuses_what_is_no_whole_adapter_before_it_asks_the_hub(folder, tmp_path, capsys):
    assert "holds no complete adapter" in error_of(capsys, "push", folder / "base", "me/name")
    out = shutil.copytree(folder / "no", tmp_path / "out")
    (out / "trainer_state.json").write_text("[")
    assert "trainer_state.json is damaged" in error_of(capsys, "push", out, "me/name")
    weights = out / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert "adapter_model.safetensors is truncated" in error_of(capsys, "push", out, "me/name")
