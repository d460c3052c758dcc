"""rows.py and validation: mixtures, packed conversations, held-out loss, on 1 and 2 ranks."""

import json
import random
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from conftest import (
    WORDS,
    main_in_process,
    on_ranks,
    options_of,
    read_metrics,
    write_corpus,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import download
import train_llm
from rows import Rows, row_inputs, rows_of_step

STEPS, BATCH, LENGTH, LR = 6, 4, 64, 3e-3
TEMPLATE = ("{{ bos_token }}{% for m in messages %}{{ m.role + '\n' + m.content + eos_token }}"
            "{% endfor %}{% if add_generation_prompt %}assistant\n{% endif %}")

# --- mixtures ---

MIXTURES = [("7/10", "3/10"), ("1/3", "2/3"), ("1/2", "1/3", "1/6"), ("999/1000", "1/1000")]


def places_of(shares, sizes, *, steps: int, batch: int) -> np.ndarray:
    return np.concatenate([
        rows_of_step(step, rows=sizes, shares=shares, global_batch_size=batch, seed=5)
        for step in range(steps)])


@pytest.mark.parametrize("shares", MIXTURES)
def test_a_mixture_has_its_shares_to_within_one_row_at_any_place(shares):
    shares, sizes = tuple(map(Fraction, shares)), (50, 30, 7)[: len(shares)]
    seen = places_of(shares, sizes, steps=300, batch=7)
    source = np.searchsorted(np.cumsum(sizes), seen, side="right")
    for which, share in enumerate(shares):
        so_far = np.cumsum(source == which)
        assert np.abs(so_far - float(share) * np.arange(1, len(seen) + 1)).max() <= 1
        whole = 2000 if share.denominator == 1000 else 2100 // 30 * 30
        assert so_far[whole - 1] == share * whole


def test_each_data_set_of_a_mixture_passes_through_its_own_rows_epoch_by_epoch():
    shares, sizes = (Fraction(3, 4), Fraction(1, 4)), (9, 4)
    seen = places_of(shares, sizes, steps=12, batch=4)
    first, second = seen[seen < 9], seen[seen >= 9] - 9
    for rows, size in ((first, 9), (second, 4)):
        epochs = rows.reshape(-1, size)
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs.tolist())
        assert epochs.tolist()[0] != epochs.tolist()[1]
    assert places_of(shares, sizes, steps=24, batch=2).tolist() == seen.tolist()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_out_the_rows_of_a_mixed_step_whatever_their_number(ranks):
    step_rows = rows_of_step(7, rows=(9, 4), shares=(Fraction(3, 4), Fraction(1, 4)),
                             global_batch_size=8, seed=5)
    args = train_llm.argparse.Namespace(batch_size=2)
    shares = [train_llm.rows_of_rank(step_rows, args, train_llm.Processes(
        rank, rank, ranks, 0, torch.device("cpu"))) for rank in range(ranks)]
    assert all(share.shape == (8 // ranks // 2, 2) for share in shares)
    assert np.stack(shares, axis=1).flatten().tolist() == step_rows.tolist()


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny) -> list[Path]:
    """Rows of two data sets, prepared."""
    folder = tmp_path_factory.mktemp("two")
    found = []
    for name, texts in (("a", ["the cat " * 60]), ("b", ["a dog " * 90, "not"])):
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        found.append(download.prepare_rows(model_name=str(tiny), dataset_name=str(data),
                                           seq_length=16, rows_dir=folder / "rows"))
    return found


def test_data_sets_without_shares_are_one_after_another_as_one(folders):
    both, parts = Rows(*folders), [Rows(folder) for folder in folders]
    sizes = [len(part) for part in parts]
    assert len(both) == sum(sizes) == both.epoch and min(sizes) > 5
    assert np.array_equal(both.tokens[np.arange(len(both))], np.concatenate(
        [part.tokens[np.arange(len(part))] for part in parts]))
    for row in (0, sizes[0] - 1, sizes[0], len(both) - 1):
        part, nth = (parts[0], row) if row < sizes[0] else (parts[1], row - sizes[0])
        assert np.array_equal(both.marks[row], part.marks[nth])
        assert both.targets[row] == part.targets[nth]
    seen = places_of(both.shares, both.sizes, steps=len(both), batch=1)
    assert sorted(seen.tolist()) == list(range(len(both)))


def test_an_epoch_of_a_mixture_ends_with_the_data_set_that_ends_first(folders):
    sizes = [len(Rows(folder)) for folder in folders]
    mixed = Rows(*folders, shares=(Fraction(9, 10), Fraction(1, 10)))
    assert mixed.epoch == Fraction(sizes[0] * 10, 9)
    args = train_llm.argparse.Namespace(
        num_epochs=2, global_batch_size=4, max_steps=None, profile=None)
    assert train_llm.planned_steps(args, mixed) == sizes[0] * 20 // 9 // 4
    args.profile = 999
    with pytest.raises(train_llm.InputError, match="--profile 999: the run has"):
        train_llm.planned_steps(args, mixed)


def test_an_index_of_minus_one_is_a_row_without_targets(folders):
    here = train_llm.planned_processes()
    _, labels, _, _ = Rows(*folders).batch(np.array([0, -1]), here)
    assert (labels[0] >= 0).any() and (labels[1] == -100).all()


# --- conversations through the trainer ---


def write_chats(path: Path, number: int, seed: int) -> Path:
    rng = random.Random(seed)
    with path.open("w") as file:
        for _ in range(number):
            turns = [{"role": role, "content": " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))}
                     for role in ("user", "assistant") * rng.randint(1, 2)]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny):
    """Runs on a mixture of two files of conversations with held-out rows; {name: its folder}."""
    folder = tmp_path_factory.mktemp("chats")
    (folder / "chat.jinja").write_text(TEMPLATE)
    names = [f"{write_chats(folder / 'a.jsonl', 90, 1)}=0.75",
             f"{write_chats(folder / 'b.jsonl', 60, 2)}=0.25"]
    recipe = dict(
        save_dir=folder, rows_dir=folder / "rows", model_name=tiny, seq_length=LENGTH, lr=LR,
        global_batch_size=BATCH, num_epochs=9, max_steps=STEPS, warmup_steps=3, log_freq=1, seed=3,
        chat_template=folder / "chat.jinja", val_fraction=0.2, val_freq=3, ckpt_freq=3,
        keep_checkpoints=9)

    def argv(**options) -> list[str]:
        return [*options_of(**recipe | options), "--dataset-name", *names]

    args = train_llm.parse_args(argv(experiment_name="x"))
    for held_out in (False, True):
        for inputs in row_inputs(args, held_out=held_out):
            download.prepare_rows(**inputs)
    on_ranks(2, [
        {"do": "train", "ranks": 1, "argv": argv(experiment_name="one", batch_size=2)},
        {"do": "copy", "run": str(folder / "one"), "to": str(folder / "resumed"),
         "without": ["checkpoints/step-00000006"]},
        *({"do": "train", "argv": argv(experiment_name=name)} for name in ("two", "resumed")),
    ], folder)
    return dict(folder=folder, argv=argv, args=args)


def losses_of(runs, name: str, key: str = "loss") -> list[float]:
    return [row[key] for row in read_metrics(runs["folder"] / name) if key in row]


def rows_of(runs, *, held_out: bool) -> Rows:
    found = train_llm.find_rows(runs["args"], held_out=held_out)
    assert len(found.metas) == 2
    return found


def test_packed_conversations_train_as_each_alone_would(runs, tiny):
    rows = rows_of(runs, held_out=False)
    order = [rows.of_step(step, BATCH, 3) for step in range(STEPS)]
    padded = [row for row in np.concatenate(order) if (rows.tokens[row][-3:] == 1).all()]
    assert padded and any((rows.marks[row] & 1).sum() > 2 for row in np.concatenate(order))
    losses, norms, _ = reference.train(tiny, rows.tokens, rows.marks, order=order, lr=LR, warmup=3)
    assert losses_of(runs, "one") == pytest.approx(losses, rel=1e-5)
    assert losses_of(runs, "one", "grad_norm") == pytest.approx(norms, rel=1e-4)


def test_a_mixture_is_the_same_on_two_ranks_and_after_a_resume(runs):
    one, two, resumed = (losses_of(runs, name) for name in ("one", "two", "resumed"))
    assert one == pytest.approx(two, rel=1e-5) and one == pytest.approx(resumed, rel=1e-5)
    assert one[:3] == resumed[:3] and len(one) == STEPS


def test_the_exported_model_has_the_template_that_it_was_trained_with(runs):
    assert AutoTokenizer.from_pretrained(runs["folder"] / "one/model").chat_template == TEMPLATE



@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_and_other_conversations_do_not_reach_a_conversations_logits(runs, tiny, attention):
    rows = rows_of(runs, held_out=False)
    row = next(i for i in range(len(rows)) if (rows.marks[i] & 1).sum() > 2
               and (rows.tokens[i][-3:] == 1).all())
    starts = np.flatnonzero(rows.marks[row] & 1)
    ids, _, positions, _ = rows.batch(np.array([row]), train_llm.planned_processes())
    model = AutoModelForCausalLM.from_pretrained(tiny, attn_implementation=attention)
    packed = model(ids, position_ids=positions, use_cache=False).logits[0]
    for start, end in zip(starts, starts[1:], strict=False):
        alone = model(ids[:, start:end], use_cache=False).logits[0]
        assert torch.allclose(packed[start:end], alone, atol=1e-5)


# --- validation ---


def held_out_loss(rows: Rows, model) -> float:
    total = count = 0
    for row in range(len(rows)):
        for ids, wanted in reference.documents_of(rows.tokens[row], rows.marks[row]):
            if wanted[1:].any():
                chosen = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])
                total, count = total - chosen[wanted[1:], 0].sum().item(), count + wanted.sum()
    return total / int(count)


def test_the_validation_loss_is_that_of_plain_pytorch_on_the_held_out_rows(runs):
    model = AutoModelForCausalLM.from_pretrained(runs["folder"] / "one/model")
    rows = rows_of(runs, held_out=True)
    assert len(rows) % 2, "the last batch must not be whole"
    with torch.no_grad():
        expected = held_out_loss(rows, model)
    found = losses_of(runs, "one", "val_loss")
    assert len(found) == 2 and found[1] < found[0]
    assert found[1] == pytest.approx(expected, rel=1e-5)
    last = read_metrics(runs["folder"] / "one")[-1]
    assert last["val_perplexity"] == pytest.approx(np.exp(expected), rel=1e-4)


def test_the_validation_loss_is_the_same_on_any_number_of_ranks(runs):
    one, two, resumed = (losses_of(runs, name, "val_loss") for name in ("one", "two", "resumed"))
    assert one == pytest.approx(two, rel=1e-6) and one == pytest.approx(resumed, rel=1e-6)


def test_eval_only_tells_the_loss_of_the_newest_checkpoint_or_else_of_the_model(runs, tiny, capsys):
    main_in_process_of(runs, experiment_name="one", eval_only=None)
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == STEPS
    assert found["val_loss"] == pytest.approx(losses_of(runs, "one", "val_loss")[-1], rel=1e-6)
    main_in_process_of(runs, experiment_name="none", eval_only=None)
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == 0 and not (runs["folder"] / "none").exists()
    with torch.no_grad():
        expected = held_out_loss(rows_of(runs, held_out=True),
                                 AutoModelForCausalLM.from_pretrained(tiny))
    assert found["val_loss"] == pytest.approx(expected, rel=1e-5)


def main_in_process_of(runs, **options) -> None:
    try:
        train_llm.main(runs["argv"](**options))
    finally:
        if train_llm.dist.is_initialized():
            train_llm.dist.destroy_process_group()


def test_another_data_set_is_validated_on_when_asked_and_at_the_end_and_is_in_no_steps_time(
    tmp_path, tiny, corpus, rows_dir, monkeypatch
):
    def slow(*args):
        nonlocal late
        late += 1000
        return validate(*args)

    late, validate, clock = 0, train_llm.validate, train_llm.time.perf_counter
    monkeypatch.setattr(train_llm, "validate", slow)
    monkeypatch.setattr(train_llm.time, "perf_counter", lambda: clock() + late)
    other = write_corpus(tmp_path / "other.jsonl")
    for data in (corpus, other):  # in this process: the script would start one for each
        download.prepare_rows(model_name=str(tiny), dataset_name=str(data), seq_length=32,
                              rows_dir=rows_dir)
    main_in_process(experiment_name="x", save_dir=tmp_path, rows_dir=rows_dir, model_name=tiny,
                    dataset_name=corpus, val_dataset_name=other, seq_length=32, max_steps=5,
                    global_batch_size=2, log_freq=1, ckpt_freq=0, export_dtype="none", val_freq=3)
    rows = read_metrics(tmp_path / "x")
    assert [row["step"] for row in rows if "val_loss" in row] == [3, 5] and late == 2000
    assert all(row["step_seconds"] < 900 for row in rows)


def test_an_option_of_rows_needs_an_effect_on_training_or_validation_data(
    tmp_path, tiny, corpus, rows_dir
):
    pairs, other = tmp_path / "pairs.jsonl", write_corpus(tmp_path / "other.jsonl")
    pairs.write_text(json.dumps({"prompt": "the cat", "completion": " sees the dog"}) + "\n")
    for data in (corpus, pairs, other):
        download.prepare_rows(model_name=str(tiny), dataset_name=str(data), seq_length=32,
                              rows_dir=rows_dir, train_on="all", among_others=True)
    options = dict(experiment_name="x", save_dir=tmp_path, rows_dir=rows_dir, model_name=tiny,
                   dataset_name=corpus, seq_length=32, max_steps=1, global_batch_size=2,
                   ckpt_freq=0, export_dtype="none", train_on="all")
    main_in_process(**options, val_dataset_name=pairs)
    assert np.isfinite(read_metrics(tmp_path / "x")[0]["val_loss"])
    with pytest.raises(download.InputError, match="--train-on all has no effect on .* and .*other"):
        main_in_process(**options, val_dataset_name=other)


@pytest.mark.parametrize("options, message", [
    (dict(eval_only=None), "--eval-only and --val-freq need --val-dataset-name or"),
    (dict(val_freq=5), "--eval-only and --val-freq need --val-dataset-name or"),
    (dict(val_fraction=0.1, val_dataset_name="v"), "exclude each other"),
    (dict(val_dataset_split="test"), "--val-dataset-split has no effect without"),
])
def test_options_of_validation_that_do_not_fit_are_refused(options, message):
    good = dict(experiment_name="x", model_name="m", dataset_name="d")
    with pytest.raises(train_llm.OptionError, match=message):
        train_llm.parse_args(options_of(**good | options))
