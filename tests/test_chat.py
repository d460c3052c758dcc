"""Conversations and prompts: formats, chat templates and their masks, packing, held-out rows."""

import json
import os
import shutil
import sys
from datetime import datetime
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, WORDS, run
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import download
from download import STARTS, TARGET, InputError, best_fit, prepare_rows, read_mixture

T = 128
SPECIAL = ["<bos>", "<eos>", "<|start|>", "<|stop|>", "<|end|>"]
HEAD = "'<|start|>' + m.role + '<|stop|>\n\n'"
PROMPT = "{% if add_generation_prompt %}<|start|>assistant<|stop|>\n\n{% endif %}"
TEMPLATES = {  # as Llama 3's: trimmed, BOS; as ChatML: not trimmed, a line break after each turn
    "llama": "{{ bos_token }}{% for m in messages %}{{ " + HEAD + " + m.content | trim + '<|end|>' "
             "}}{% endfor %}" + PROMPT,
    "chatml": "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|start|>system\n"
              "Be kind.<|end|>\n{% endif %}{{ '<|start|>' + m.role + '\n' + m.content + '<|end|>\n'"
              " }}{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}",
    "marked": "{% for m in messages %}{{ " + HEAD + " }}{% if m.role == 'assistant' %}"
              "{% generation %}{{ m.content + '<|end|>' }}{% endgeneration %}{% else %}"
              "{{ m.content + '<|end|>' }}{% endif %}{% endfor %}",
    "tools": "{{ bos_token }}{{ 'Today: ' + strftime_now('%d %b %Y') }}{% for t in tools or [] %}"
             "{{ t | tojson }}{% endfor %}{% for m in messages %}{% if m.tool_calls %}"
             "<|start|>assistant<|stop|>\n\n{{ m.content or '' }}{% for c in m.tool_calls %}"
             "{{ c.function.name + c.function.arguments | tojson }}{% endfor %}<|end|>"
             "{% else %}{{ " + HEAD + " + m.content + '<|end|>' }}{% endif %}{% endfor %}" + PROMPT,
    "alters": "{% for m in messages %}{{ " + HEAD + " + m.content | upper + '<|end|>' }}"
              "{% endfor %}" + PROMPT,
    "no prefix": "{% for m in messages %}{{ '<|start|>' + messages | length | string + m.content +"
                 " '<|end|>' }}{% endfor %}",
    "no end": "{% for m in messages %}{{ m.role + m.content + '\n' }}{% endfor %}"
              "{% if add_generation_prompt %}assistant{% endif %}",
    "refuses": "{{ raise_exception('never') }}",
}
CHATS = [
    [("system", "be brief "), ("user", "the cat?"), ("assistant", " the dog\n\nsleeps  "),
     ("user", "h\u00e9 \U0001f600"), ("assistant", "\U0001f600\u4f60 over <b>&amp;</b>")],
    [("user", "\n sees"), ("assistant", "a\n")],
    [("user", "the river " * 12), ("assistant", "old stone " * 9)],
    [("user", ""), ("assistant", "not")],
]


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """Folders of a tokenizer with each chat template, and one without; no weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([" ".join(WORDS), "\n\n\n"] * 4, trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.post_processor = processors.Sequence([  # as Llama 3's: offsets without white space
        processors.ByteLevel(trim_offsets=True),
        processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")
    folder = tmp_path_factory.mktemp("models")
    fast.save_pretrained(folder / "none")
    for name, template in TEMPLATES.items():
        fast.chat_template = template
        fast.save_pretrained(folder / name)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture
def inputs(models, tmp_path) -> dict:
    return dict(model_name=str(models["llama"]), seq_length=T, rows_dir=tmp_path / "rows",
                dataset_name=str(write_lines(tmp_path / "data.jsonl", map(as_messages, CHATS))))


def as_messages(chat) -> dict:
    return {"messages": [{"role": role, "content": words} for role, words in chat]}


def write_lines(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_meta(folder: Path) -> dict:
    return json.loads((folder / "meta.json").read_text())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")}


def documents_of(folder: Path, model: Path) -> list[tuple[str, str]]:
    """(text, what of it is trained) of each document in the rows, decoded; sorted."""
    meta = read_meta(folder)
    shape = meta["rows"], meta["seq_length"]
    decode = AutoTokenizer.from_pretrained(model).backend_tokenizer.decode
    found = []
    for ids, marks in zip(np.fromfile(folder / "tokens.bin", "<u4").reshape(shape),
                          np.fromfile(folder / "marks.bin", np.uint8).reshape(shape), strict=True):
        starts = [*np.flatnonzero(marks & STARTS), len(ids)]
        for start, end in zip(starts, starts[1:], strict=False):
            part, trained = ids[start:end], (marks[start:end] & TARGET) > 0
            if trained.any():
                found.append(tuple(decode(some.tolist(), skip_special_tokens=False)
                                   for some in (part, part[trained])))
            else:
                assert set(part) == {1} and end == len(ids), "neither a document nor padding"
    return sorted(found)


# --- masks ---


@pytest.mark.parametrize("template, trims", [("llama", True), ("chatml", False), ("marked", False)])
def test_trained_tokens_are_the_assistants_words_and_end_marks_alone(models, inputs, template,
                                                                     trims):
    folder = prepare_rows(**inputs | dict(model_name=str(models[template]), seq_length=256))
    tokenizer = AutoTokenizer.from_pretrained(models[template])
    expected = [(tokenizer.apply_chat_template(as_messages(chat)["messages"], tokenize=False),
                 "".join((words.strip() if trims else words) + "<|end|>"
                         for role, words in chat if role == "assistant")) for chat in CHATS]
    assert documents_of(folder, models[template]) == sorted(expected)
    assert read_meta(folder)["trained_tokens"] < read_meta(folder)["tokens"] / 2


TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "the \u00e9 cat"}}}
TOOL_CHAT = {"tools": TOOLS, "messages": [
    {"role": "user", "content": "a cat?"}, {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "old"}, {"role": "assistant", "content": "an old cat"}]}


def test_a_tool_call_is_trained_and_its_answer_is_not(models, inputs, tmp_path):
    as_text = json.loads(json.dumps(TOOL_CHAT))
    call = as_text["messages"][1]["tool_calls"][0]["function"]
    call["arguments"], as_text["tools"] = json.dumps(call["arguments"]), json.dumps(TOOLS)
    sharegpt = {"tools": json.dumps(TOOLS), "conversations": [
        {"from": "human", "value": "a cat?"},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "old"}, {"from": "gpt", "value": "an old cat"}]}
    for name, chat in (("dict", TOOL_CHAT), ("text", as_text), ("sharegpt", sharegpt)):
        data = write_lines(tmp_path / f"{name}.jsonl", [chat])
        folder = prepare_rows(**inputs | dict(
            model_name=str(models["tools"]), dataset_name=str(data), seq_length=256))
        (whole, trained), = documents_of(folder, models["tools"])
        assert trained == 'look{"at": "the \u00e9 cat"}<|end|>an old cat<|end|>'
        assert json.dumps(TOOLS[0]) in whole and "tool<|stop|>\n\nold<|end|>" in whole


def test_a_template_that_asks_for_the_date_is_told_the_same_one_every_day(models, inputs):
    folder = prepare_rows(**inputs | dict(model_name=str(models["tools"]), seq_length=256))
    assert all(whole.startswith("<bos>Today: 26 Jul 2024<|start|>")
               for whole, _ in documents_of(folder, models["tools"]))
    assert read_meta(folder)["today"] == "2024-07-26"
    assert "told that today is 2024-07-26" in download.report(folder)


def test_a_message_may_hold_fields_that_only_parquet_has(inputs, tmp_path):
    chats = [as_messages(chat)["messages"] for chat in CHATS]
    for message in chain.from_iterable(chats):
        message["when"] = datetime(2024, 1, 1)
    pq.write_table(pa.table({"messages": chats}), tmp_path / "dated.parquet")
    dated = prepare_rows(**inputs | dict(dataset_name=str(tmp_path / "dated.parquet")))
    assert contents(dated) == contents(prepare_rows(**inputs))


def test_a_system_field_that_is_no_text_is_told(inputs, tmp_path):
    row = as_sharegpt(CHATS[1]) | {"system": ["Be brief"]}
    data = write_lines(tmp_path / "bad.jsonl", [row])
    with pytest.raises(InputError, match='line 1: field "system" is .*needed a string'):
        prepare_rows(**inputs | dict(dataset_name=str(data)))


def test_a_chat_template_from_a_file_replaces_the_tokenizers(models, inputs, tmp_path):
    (tmp_path / "own.jinja").write_text(TEMPLATES["chatml"])
    own = prepare_rows(**inputs | dict(model_name=str(models["none"]),
                                       chat_template=tmp_path / "own.jinja"))
    assert contents(own) == contents(prepare_rows(**inputs | dict(
        model_name=str(models["chatml"]))))
    (tmp_path / "own.jinja").write_text(TEMPLATES["llama"])
    assert prepare_rows(**inputs | dict(
        model_name=str(models["none"]), chat_template=tmp_path / "own.jinja")) != own


def test_train_on_all_learns_every_token_but_the_first(inputs, models):
    folder = prepare_rows(**inputs, train_on="all")
    meta = read_meta(folder)
    assert meta["trained_tokens"] == meta["tokens"] - meta["documents"]
    assert all("<bos>" + trained == whole for whole, trained in
               documents_of(folder, models["llama"]))


@pytest.mark.parametrize("template, message", [
    ("alters", "line 1, message 3: the chat template alters this turn, or does not show"),
    ("no prefix", "line 1, message 3: the chat template alters this turn, or does not show"),
    ("no end", "ends a turn of the assistant with no special token"),
    ("refuses", "line 1: the chat template refuses it .never."),
    ("none", "no chat template for conversations .* give --chat-template"),
])
def test_a_mask_that_cannot_be_derived_exactly_is_refused(models, inputs, template, message):
    with pytest.raises(InputError, match=message):
        prepare_rows(**inputs | dict(model_name=str(models[template])))


# --- formats ---


def as_sharegpt(chat) -> dict:
    names = {"user": "human", "assistant": "gpt"}
    turns = [{"from": names[role], "value": words} for role, words in chat if role != "system"]
    return {"conversations": turns} | {role: words for role, words in chat if role == "system"}


def write_parquet(path: Path, rows: list[dict]) -> Path:
    pq.write_table(pa.Table.from_pylist([row | {"id": 1} for row in rows]), path)
    return path


def test_other_formats_of_the_same_conversations_make_the_same_rows(inputs, tmp_path):
    parts = [{"messages": [{"role": role, "content": [{"type": "text", "text": words}]}
                           for role, words in chat]} for chat in CHATS]
    write_lines(tmp_path / "sharegpt.jsonl", map(as_sharegpt, CHATS))
    write_lines(tmp_path / "parts.jsonl", parts)
    write_parquet(tmp_path / "messages.parquet", list(map(as_messages, CHATS)))
    (tmp_path / "array.json").write_text(json.dumps(list(map(as_messages, CHATS))))
    wanted = contents(prepare_rows(**inputs))
    for name in ("sharegpt.jsonl", "parts.jsonl", "messages.parquet", "array.json"):
        made = prepare_rows(**inputs | dict(dataset_name=str(tmp_path / name)))
        assert contents(made) == wanted, name


def test_alpaca_is_a_conversation_of_instruction_input_and_output(inputs, tmp_path, models):
    data = write_lines(tmp_path / "alpaca.jsonl", [
        {"instruction": "sees", "input": "a cat", "output": "not"},
        {"instruction": "runs", "input": "", "output": "over", "system": "be old"}])
    folder = prepare_rows(**inputs | dict(dataset_name=str(data)))
    turn = "<|start|>{}<|stop|>\n\n{}<|end|>".format
    assert documents_of(folder, models["llama"]) == sorted([
        ("<bos>" + turn("user", "sees\na cat") + turn("assistant", "not"), "not<|end|>"),
        ("<bos>" + turn("system", "be old") + turn("user", "runs") + turn("assistant", "over"),
         "over<|end|>")])
    assert read_meta(folder)["kind"] == "alpaca"
    assert "prompt (instruction, output)" in download.report(folder)


def test_of_prompt_and_completion_the_completion_and_its_end_are_trained(inputs, tmp_path, models):
    data = write_lines(tmp_path / "prompt.jsonl", [
        {"prompt": "the cat ", "completion": "sees <eos> \n"}, {"prompt": "", "completion": "a"}])
    folder = prepare_rows(**inputs | dict(dataset_name=str(data)))
    assert documents_of(folder, models["llama"]) == sorted([
        ("<bos>the cat sees <eos> \n<eos>", "sees <eos> \n<eos>"), ("<bos>a<eos>", "a<eos>")])
    tokens = np.fromfile(folder / "tokens.bin", "<u4")
    assert (tokens != 1)[: read_meta(folder)["tokens"]].sum() == read_meta(folder)["tokens"] - 2


def test_two_formats_that_would_both_do_are_a_question_and_data_format_is_the_answer(inputs,
                                                                                     tmp_path):
    rows = [as_messages(chat) | {"text": "the cat " * 99} for chat in CHATS]
    both = inputs | dict(dataset_name=str(write_lines(tmp_path / "both.jsonl", rows)))
    with pytest.raises(InputError, match=r"line 1: can be read as text \(text\) and as chat"):
        prepare_rows(**both)
    assert read_meta(prepare_rows(**both, data_format="text"))["kind"] == "text"
    assert contents(prepare_rows(**both, data_format="chat")) == contents(prepare_rows(**inputs))
    with pytest.raises(InputError, match='no column or field "prompt" and "completion"'):
        prepare_rows(**both, data_format="prompt")


@pytest.mark.parametrize("options, row, named", [
    (dict(train_on="all"), {"text": "a " * T}, "--train-on all"),
    (dict(overlong="drop"), {"text": "a " * T}, "--overlong drop"),
    (dict(chat_template=__file__), {"prompt": "a", "completion": "b"}, "--chat-template"),
])
def test_an_option_without_effect_on_the_format_is_refused(inputs, tmp_path, options, row, named):
    data = write_lines(tmp_path / "rows.jsonl", [row])
    with pytest.raises(InputError, match=f"{named} has no effect on"):
        prepare_rows(**inputs | dict(dataset_name=str(data)) | options)


def test_an_option_has_to_have_an_effect_on_one_data_set_of_a_run(inputs, tmp_path, capfd):
    texts = [str(write_lines(tmp_path / f"{name}.jsonl", [{"text": "a " * T}])) for name in "ab"]
    words = ["--model-name", inputs["model_name"], "--seq-length", str(T), "--skip-model",
             "--rows-dir", str(inputs["rows_dir"]), "--train-on", "all", "--dataset-name"]
    assert download.main([*words, texts[0], inputs["dataset_name"]]) == 0
    assert download.main([*words, *texts]) == 1
    assert f"--train-on all has no effect on {texts[0]} and {texts[1]}, whose rows are text" in (
        capfd.readouterr().err)
    for among_others in (True, False):  # as the trainer has them made
        asked = inputs | dict(dataset_name=texts[1], overlong="drop", among_others=among_others)
        asked["rows_dir"] = tmp_path / f"rows-{among_others}"
        if among_others:
            download.prepare_apart(**asked)
        else:
            with pytest.raises(InputError, match="see download.py's message"):
                download.prepare_apart(**asked)


# --- packing ---


def test_each_document_goes_into_the_fullest_row_that_has_room():
    rng = np.random.RandomState(0)
    for most in (7, 64):
        lengths = rng.randint(1, most + 1, size=300).tolist()
        left, expected = [], [0] * 300
        for i in sorted(range(300), key=lambda i: (-lengths[i], i)):
            fitting = [(room, row) for row, room in enumerate(left) if room >= lengths[i]]
            if not fitting:
                left.append(most)
                fitting = [(most, len(left) - 1)]
            room = min(fitting)[0]
            expected[i] = max(row for found, row in fitting if found == room)
            left[expected[i]] -= lengths[i]
        row_of = best_fit(lengths, most)
        filled = np.bincount(row_of, lengths)
        assert filled.max() <= most and sum(filled) == sum(lengths)
        assert len(filled) == len(left) <= 11 / 9 * np.ceil(sum(lengths) / most) + 1
        assert sorted(most - filled) == sorted(left)


def test_rows_are_whole_conversations_and_a_tail_of_padding_that_sees_none(inputs, models):
    folder = prepare_rows(**inputs)
    meta = read_meta(folder)
    assert meta["rows"] * T == meta["tokens"] + meta["padding_tokens"]
    assert meta["documents"] == len(CHATS) and meta["padding_tokens"] > 0
    tokens = np.fromfile(folder / "tokens.bin", "<u4").reshape(-1, T)
    marks = np.fromfile(folder / "marks.bin", np.uint8).reshape(-1, T)
    assert (tokens[marks & STARTS > 0] == 0).sum() == len(CHATS), "each starts with BOS"
    tails = [max(np.flatnonzero(mark & STARTS)) for mark in marks]
    padding = sum(T - tail for row, tail in enumerate(tails) if (tokens[row, tail:] == 1).all())
    assert padding == meta["padding_tokens"]
    assert not any((marks[row, tail:] & TARGET).any() for row, tail in enumerate(tails)
                   if tokens[row, tail] == 1)


@pytest.mark.parametrize("overlong", ["truncate", "drop"])
def test_a_conversation_longer_than_a_row_is_truncated_or_dropped_and_counted(inputs, tmp_path,
                                                                             overlong):
    chats = [*CHATS, [("user", "a"), ("assistant", "the cat " * T)],
             [("user", "the cat " * T), ("assistant", "a")]]  # cut, this one has nothing to learn
    data = write_lines(tmp_path / "long.jsonl", map(as_messages, chats))
    meta = read_meta(prepare_rows(**inputs | dict(dataset_name=str(data), overlong=overlong)))
    cut = overlong == "truncate"
    assert (meta["truncated_documents"], meta["dropped_documents"]) == ((1, 1) if cut else (0, 2))
    assert meta["documents"] == len(CHATS) + cut and meta["dropped_tokens"] > T
    assert meta["rows"] * T == meta["tokens"] + meta["padding_tokens"]


def test_small_windows_hold_the_same_documents(inputs, models, tmp_path, monkeypatch):
    data = write_lines(tmp_path / "many.jsonl", map(as_messages, CHATS * 20))
    inputs |= dict(dataset_name=str(data))
    whole = documents_of(prepare_rows(**inputs), models["llama"])
    monkeypatch.setattr(download, "WINDOW_TOKENS", 200)
    monkeypatch.setattr(download, "BATCH_CHARACTERS", 300)
    folder = prepare_rows(**inputs | dict(rows_dir=tmp_path / "others"))
    assert documents_of(folder, models["llama"]) == whole and len(whole) == 80


LIMITED = """
import json, resource, sys
sys.path.insert(0, {root!r})
import download
download.BATCH_CHARACTERS, download.WINDOW_TOKENS = 1 << 14, 1 << 14
inputs, warm, big = json.loads(sys.argv[1]), sys.argv[2:4], sys.argv[4:]
for name in warm:
    download.prepare_rows(**inputs | dict(dataset_name=name))
status = dict(line.split(":") for line in open("/proc/self/status"))
used = int(status["VmData"].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + {limit}, used + {limit}))
for name in big:
    print(download.prepare_rows(**inputs | dict(dataset_name=name)))
"""


def test_data_three_times_larger_than_a_memory_limit_are_prepared_within_it(inputs, tmp_path):
    limit, words = 1 << 20, "the cat " * 250
    rows = {"text": {"text": words}, "chat": as_messages([("user", words), ("assistant", "a")])}
    warm = [write_lines(tmp_path / f"warm-{kind}.jsonl", [row] * 20) for kind, row in rows.items()]
    big = [write_lines(tmp_path / f"{kind}.jsonl", [row] * (3 * limit // 2000))
           for kind, row in rows.items()]
    inputs |= dict(rows_dir=str(tmp_path / "rows"), seq_length=4096)
    done = run([sys.executable, "-c", LIMITED.format(root=str(ROOT), limit=limit),
                json.dumps(inputs), *warm, *big], TOKENIZERS_PARALLELISM="false",
               MALLOC_ARENA_MAX="1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(path.stat().st_size > 3 * limit for path in big)
    assert all((Path(folder) / "tokens.bin").stat().st_size > 2 * limit
               for folder in done.stdout.split())


# --- bad rows ---

GOOD = json.dumps(as_messages(CHATS[1])) + "\n"
BAD = {  # name: (the row, what the message must say)
    "broken": ('{"messages": [', "line 2: broken JSON"),
    "no field": ('{"message": []}', r'line 2: no column or field "messages" .*\(found: message\)'),
    "empty": ('{"messages": []}', "line 2: an empty conversation"),
    "null": ('{"messages": null}', "line 2: an empty conversation, or none"),
    "user twice": (as_messages([("user", "a"), ("user", "b"), ("assistant", "c")]),
                   "line 2, message 2: two user turns in a row"),
    "bytes": (b'{"messages": "\xff"}', "line 2: byte 0xff is not UTF-8"),
    "long word": (as_messages([("user", "a"), ("assistant", "x" * 1_000_000)]),
                  "line 2: a single word of 1,000,000 characters"),
    "system only": (as_messages([("system", "a")]), "line 2: no turn of the assistant .*system"),
    "silent": (as_messages([("user", "a"), ("assistant", " \n")]),
               "line 2, message 2: the assistant says nothing"),
    "role": (as_messages([("robot", "a")]), "line 2, message 1: found .*robot.*one of human"),
    "roles": (as_messages([(["user"], "a"), ("assistant", "b")]), r"line 2, message 1: found .*\["),
    "content": (as_messages([("user", 3), ("assistant", "a")]),
                'line 2, message 1: "content" is 3, needed a string'),
    "image": (as_messages([("user", [{"type": "image"}]), ("assistant", "a")]),
              'line 2, message 1: "content" is .*image.*, needed a string'),
    "spelled": (as_messages([("user", "a <|end|> b"), ("assistant", "a")]),
                r"line 2: spells out <\|end\|>"),
    "half pair": ('{"messages": [{"role": "user", "content": "a\\ud800"},'
                  ' {"role": "assistant", "content": "b"}]}', "line 2: .*ud800. is half of a"),
    "call": ({"messages": [{"role": "user", "content": "a"},
                           {"role": "assistant", "tool_calls": [{"name": "look"}]}]},
             "line 2, message 2: a tool call .*needed"),
    "arguments": ({"messages": [{"role": "user", "content": "a"}, {
        "role": "assistant", "tool_calls": [{"function": {"name": "x", "arguments": "{"}}]}]},
        "line 2, message 2: .* of a tool is not JSON"),
}


def bad_line(row) -> bytes:
    return row if isinstance(row, bytes) else (
        row if isinstance(row, str) else json.dumps(row)).encode()


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_told_by_file_and_line(inputs, tmp_path, case):
    row, message = BAD[case]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(GOOD.encode() + bad_line(row) + b"\n" + GOOD.encode())
    with pytest.raises(InputError, match=f"bad.jsonl, {message}"):
        prepare_rows(**inputs | dict(dataset_name=str(path)))
    assert not [folder for folder in inputs["rows_dir"].iterdir() if folder.suffix != ".lock"]


def test_white_space_that_joins_a_token_of_the_template_is_told(inputs, models, tmp_path):
    chat = [("user", "a"), ("assistant", "\n\nb")]
    data = write_lines(tmp_path / "bad.jsonl", [as_messages(chat)])
    with pytest.raises(InputError, match="bad.jsonl, line 1: no whole number of tokens makes what"):
        prepare_rows(**inputs | dict(dataset_name=str(data), model_name=str(models["chatml"])))


def test_skip_bad_rows_counts_them_tells_them_and_goes_on(inputs, tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    rows = [row for row, _ in BAD.values()]
    with path.open("wb") as file:
        for i, chat in enumerate(CHATS):
            file.writelines(bad_line(row) + b"\n" for row in rows[i::4])
            file.write(json.dumps(as_messages(chat)).encode() + b"\n")
    folder = prepare_rows(**inputs | dict(dataset_name=str(path), skip_bad_rows=True))
    assert read_meta(folder)["bad_rows"] == len(BAD)
    assert contents(folder) == contents(prepare_rows(**inputs))
    told = capsys.readouterr().err
    assert told.count("skipped: ") == 10 and "bad.jsonl, line 1: broken JSON" in told
    assert f"{len(BAD)} bad rows skipped" in download.report(folder)


# --- held out, mixed ---


def test_held_out_documents_are_no_training_documents_and_equal_ones_stay_together(inputs, models,
                                                                                  tmp_path):
    chats = [[("user", f"{i % 90}"), ("assistant", "a cat")] for i in range(200)]
    data = write_lines(tmp_path / "data.jsonl", map(as_messages, chats))
    inputs |= dict(dataset_name=str(data))
    train, held_out = (documents_of(prepare_rows(
        **inputs, val_fraction=0.2, held_out=part), models["llama"]) for part in (False, True))
    assert sorted(train + held_out) == documents_of(prepare_rows(**inputs), models["llama"])
    assert not set(train) & set(held_out) and 0.1 < len(held_out) / 200 < 0.3
    write_lines(data, map(as_messages, chats[::-1]))
    again = prepare_rows(**inputs, val_fraction=0.2, held_out=True)
    assert documents_of(again, models["llama"]) == held_out


def test_a_fraction_that_holds_out_nothing_or_all_is_told(inputs):
    with pytest.raises(InputError, match="no document that is held out by --val-fraction 1e-09"):
        prepare_rows(**inputs, val_fraction=1e-9, held_out=True)
    with pytest.raises(InputError, match="no document that is not held out by .* 0.99"):
        prepare_rows(**inputs, val_fraction=0.9999999)
    with pytest.raises(InputError, match="--val-fraction 1: must be a share"):
        prepare_rows(**inputs, val_fraction=1)


def test_the_command_prepares_each_data_set_and_both_parts_of_it(inputs, tmp_path, capsys):
    other = write_lines(tmp_path / "other.jsonl", map(as_messages, CHATS[::-1]))
    words = ["--model-name", inputs["model_name"], "--seq-length", str(T), "--val-fraction", "0.5",
             "--rows-dir", str(tmp_path / "rows"), "--dataset-name"]
    assert download.main([*words, f"{inputs['dataset_name']}=0.7", f"{other}=0.3"]) == 0
    said = capsys.readouterr().out
    folders = {line.split(", in ")[1] for line in said.splitlines() if ", in " in line}
    assert len(folders) == 4 and said.count("the 0.5 held out") == 4
    for name in (inputs["dataset_name"], str(other)):
        for held_out in (False, True):
            asked = inputs | dict(dataset_name=name, val_fraction=0.5, held_out=held_out)
            assert str(prepare_rows(**asked)) in folders


def test_a_mixture_is_names_and_shares_that_sum_to_one(tmp_path, monkeypatch):
    assert read_mixture(["a.jsonl=0.7", "b=2.1"]) == [("a.jsonl", 0.25), ("b", 0.75)]
    assert read_mixture(["a", "b"]) == [("a", None), ("b", None)]
    monkeypatch.chdir(tmp_path)
    Path("a=1").write_text("")
    assert read_mixture(["a=1", "x=y"]) == [("a=1", None), ("x=y", None)]
    for words, message in ((["a=1", "b"], "give each a weight above 0, or none"),
                           (["a=1", "b=0"], "give each a weight above 0, or none"),
                           (["b=0"], "give each a weight above 0, or none"),
                           (["a=1", "a=2"], "one is named twice"),
                           (["a=0.1234567", "b=0.8765433"], "give weights of fewer digits")):
        if words[0] == "a=1":
            Path("a=1").unlink(missing_ok=True)
        with pytest.raises(InputError, match=message):
            read_mixture(words)


@pytest.mark.drill
def test_masks_of_real_tokenizers_over_real_files(tmp_path):
    """CHAT_MODELS and CHAT_FILES name tokenizers and conversations, separated by colons."""
    for model in os.environ["CHAT_MODELS"].split(":"):
        tokenizer = AutoTokenizer.from_pretrained(model)
        for data in os.environ["CHAT_FILES"].split(":"):
            folder = prepare_rows(model_name=model, dataset_name=data, seq_length=2048,
                                  rows_dir=tmp_path)
            meta = read_meta(folder)
            expected = []
            rows = download.read_data(data, None, "train", download.BadRows(False))
            for _, _, chat in download.read_documents(rows, None, download.BadRows(False), {}):
                whole = tokenizer.apply_chat_template(chat["messages"], tokenize=False)
                expected.append((whole, [m["content"] for m in chat["messages"]
                                         if m["role"] == "assistant"]))
            print(f"{model} {data}: {download.report(folder)}")
            assert meta["documents"] == len(expected)
            found = documents_of(folder, model)
            for (whole, trained), (text, words) in zip(found, sorted(expected), strict=True):
                assert whole == text
                end = trained[-(len(trained) - sum(map(len, words))) // len(words):]
                assert trained in ("".join(word + end for word in words),
                                   "".join(word.strip() + end for word in words))
            assert meta["padding_tokens"] < 0.03 * meta["rows"] * 2048
            shutil.rmtree(folder)
