"""train_llm.py against plain PyTorch, and its behaviour on bad input."""

import json
import math
import os
import re
import shutil
import sys
import time
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
import try_models
from conftest import (
    ROOT,
    build_tiny_model,
    build_tokenizer,
    main_in_process,
    on_ranks,
    options_of,
    read_metrics,
    run,
    torchrun,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import download
import train_llm
from rows import rows_of_step

BFLOAT16 = re.compile("(un)?joined|$")  # in the name of a run that computes as on a GPU
COMPILED = {"compiled": "varlen", "compiled-alone": "varlen", "compiled-on-the-host": "sdpa",
            "compiled-all-on-the-host": "sdpa", "gemma4": "sdpa"}  # attention by name of the run
STEPS, BATCH, LENGTH, LR = 10, 6, 32, 3e-3
RECIPE = dict(seq_length=LENGTH, global_batch_size=BATCH, max_steps=STEPS, lr=LR, warmup_steps=3,
              log_freq=1, seed=3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny, corpus, rows_dir):
    """Every training run of this file, in one start of the processes; {name: its folder}."""
    folder = tmp_path_factory.mktemp("runs")
    models = {"llama": tiny} | {
        kind: build_tiny_model(folder / kind, kind)
        for kind in ("qwen3", "gemma", "gemma2", "mistral", "gemma4")
    }
    models["dropout"] = build_tiny_model(folder / "dropout-model", attention_dropout=0.3)
    for model in models.values():  # in this process: the script would start one for each
        download.prepare_rows(model_name=str(model), dataset_name=str(corpus), seq_length=LENGTH,
                              rows_dir=rows_dir)
    plan = {  # name: (ranks, model, options beside the recipe)
        "one": (1, "llama", dict(batch_size=6, loss_chunk=0)),
        "one-accumulated": (1, "llama", dict(batch_size=2, loss_chunk=7)),
        "two": (2, "llama", dict(batch_size=3)),
        "two-accumulated": (2, "llama", dict(batch_size=1)),
        "three": (3, "llama", dict(batch_size=2)),
        "recomputed": (2, "llama", dict(batch_size=3, checkpoint_activations="on")),
        "selective": (2, "llama", dict(batch_size=3, checkpoint_activations="selective")),
        "offloaded": (2, "llama", dict(batch_size=3, checkpoint_activations="offload")),
        "embedding-in-root": (2, "llama", dict(batch_size=3, wrap_embedding=False)),
        "qwen3": (2, "qwen3", dict(batch_size=3)),
        "gemma": (2, "gemma", dict(batch_size=1, checkpoint_activations="on", loss_chunk=20)),
        "gemma2": (2, "gemma2", dict(batch_size=3, loss_chunk=64)),
        "mistral": (2, "mistral", dict(batch_size=3)),
        "dropout": (2, "dropout", dict(batch_size=3, max_steps=3)),
        "dropout-again": (2, "dropout", dict(batch_size=3, max_steps=3)),
        "joined": (3, "llama", dict(batch_size=1, max_steps=4)),
        "joined-tied": (2, "gemma", dict(batch_size=3, max_steps=4)),
        "joined-on-the-host": (2, "llama", dict(batch_size=3, max_steps=4,
                                                cpu_offload="optimizer")),
        "unjoined": (3, "llama", dict(batch_size=1, max_steps=4, checkpoint_activations="on")),
        "unjoined-tied": (2, "gemma", dict(batch_size=3, max_steps=4)),
        "unjoined-on-the-host": (2, "llama", dict(batch_size=3, max_steps=4,
                                                  cpu_offload="optimizer")),
        "unjoined-memory": (3, "llama", dict(batch_size=1, max_steps=4)),
        "unjoined-tied-memory": (2, "gemma", dict(batch_size=3, max_steps=4)),
        "unjoined-on-the-host-memory": (2, "llama", dict(batch_size=3, max_steps=4,
                                                         cpu_offload="optimizer")),
        "compiled": (2, "llama", dict(
            batch_size=1, compile=None, val_dataset_name=corpus, val_freq=5)),
        "compiled-alone": (1, "llama", dict(batch_size=1, compile=None)),
        "compiled-on-the-host": (2, "llama", dict(
            batch_size=1, compile=None, cpu_offload="optimizer")),
        "compiled-all-on-the-host": (2, "llama", dict(
            batch_size=3, compile=None, cpu_offload="on", val_dataset_name=corpus)),
        "gemma4": (2, "gemma4", dict(
            batch_size=1, compile=None, checkpoint_activations="offload")),
        "random-1": (1, "llama", dict(random_init=True, max_steps=1)),
        "random-3": (3, "llama", dict(random_init=True, max_steps=1)),
    }
    on_ranks(3, [
        {"do": "train", "ranks": ranks, "bfloat16": BFLOAT16.search(name)[0],
         "copies": "memory" if name.endswith("memory") else "",
         "compiled": COMPILED.get(name, ""), "on_host": name.endswith("all-on-the-host"),
         "argv": options_of(
            experiment_name=name, save_dir=folder, rows_dir=rows_dir, model_name=models[model],
            dataset_name=corpus, **(RECIPE | extra))}
        for name, (ranks, model, extra) in plan.items()
    ], folder, timeout=600)
    return {name: folder / name for name in plan} | {"models": models}


def rows_folder(model, corpus, rows_dir):
    return download.rows_folder(
        model_name=str(model), dataset_name=str(corpus), seq_length=LENGTH, rows_dir=rows_dir
    )


@pytest.fixture(scope="module")
def expected(runs, corpus, rows_dir):
    """(losses, norms, model) of plain PyTorch, by kind of model."""
    found = {}
    for kind, model in runs["models"].items():
        if kind == "dropout":
            continue
        rows = train_llm.Rows(rows_folder(model, corpus, rows_dir))
        order = [rows_of_step(step, rows=len(rows), global_batch_size=BATCH, seed=3)
                 for step in range(STEPS)]
        found[kind] = reference.train(
            model, rows.tokens, rows.marks, order=order, lr=LR, warmup=3
        )
    return found


LLAMA = ["one", "one-accumulated", "two", "two-accumulated", "three", "recomputed", "selective",
         "offloaded", "embedding-in-root", "compiled", "compiled-alone", "compiled-on-the-host",
         "compiled-all-on-the-host"]


@pytest.mark.parametrize("name", [*LLAMA, "qwen3", "gemma", "gemma2", "mistral"])
def test_losses_norms_and_weights_are_those_of_plain_pytorch(name, runs, expected):
    losses, norms, model = expected["llama" if name in LLAMA else name]
    metrics = read_metrics(runs[name])
    assert [row["loss"] for row in metrics] == pytest.approx(losses, rel=1e-5)
    assert [row["grad_norm"] for row in metrics] == pytest.approx(norms, rel=1e-4)
    assert losses[-1] < losses[0]
    assert max(norms) > 1, "the gradients must be large enough to be clipped"
    exported = AutoModelForCausalLM.from_pretrained(runs[name] / "model", dtype="auto")
    assert exported.dtype == torch.float32
    start = dict(AutoModelForCausalLM.from_pretrained(
        runs["models"]["llama" if name in LLAMA else name]).named_parameters())
    found = dict(exported.named_parameters())
    for key, wanted in model.named_parameters():
        # Adam turns a gradient of pure rounding into a whole update, in a weight here and there:
        # so the difference is held against all that the parameter moved. (Gemma 2's with torch 2.11
        # was 9e-4 of that.)
        moved, apart = (wanted - start[key]).norm(), (found[key] - wanted).norm()
        assert apart < (1e-3 if name == "gemma2" else 2e-4) * moved, key


def test_steps_have_rows_with_different_numbers_of_targets(tiny, corpus, rows_dir, runs):
    rows = train_llm.Rows(rows_folder(tiny, corpus, rows_dir))
    first = rows_of_step(0, rows=len(rows), global_batch_size=BATCH, seed=3)
    assert len(set(rows.targets[first].tolist())) > 2


def test_layers_of_two_kinds_are_recomputed_by_the_code_that_computed_them(runs, expected):
    """Else PyTorch raises: other code keeps other tensors."""
    losses = [row["loss"] for row in read_metrics(runs["gemma4"])]
    assert losses == pytest.approx(expected["gemma4"][0], rel=1e-4)


def test_recomputation_changes_not_one_bit(runs):
    losses = [[row["loss"] for row in read_metrics(runs[name])]
              for name in ("two", "recomputed", "selective", "offloaded")]
    assert all(other == losses[0] for other in losses)


@pytest.mark.parametrize("setting", ["", "-tied", "-on-the-host"])
def test_gradients_that_are_never_joined_train_bit_for_bit_as_those_that_fsdp_joins(runs, setting):
    joined, unjoined, copied = (
        [(row["loss"], row["grad_norm"]) for row in read_metrics(runs[name.format(setting)])]
        for name in ("joined{}", "unjoined{}", "unjoined{}-memory"))
    assert joined == unjoined and len(joined) == 4 and joined[-1][0] < joined[0][0]
    assert joined == copied


def test_gradients_of_a_unit_that_is_used_twice_are_added_where_they_lie():
    """With padding before, between and behind, a parameter that is transposed, and one unused."""
    here = train_llm.planned_processes()
    sums = train_llm.units.GradientSum.__new__(train_llm.units.GradientSum)
    sums.unjoined, values = {}, torch.randn(40, dtype=torch.bfloat16, device=here.device)

    def split(unit):
        return [unit[2:14].view(3, 4), unit[16:28].view(4, 3).t(), unit[28:33]]

    unit, plain = (torch.nn.Parameter(values.clone()) for _ in range(2))
    passes = [split(plain), split(plain)]
    made = [sums.make_views(SimpleNamespace(flat_param=unit), split) for _ in range(2)]
    for first, second in (passes, made):
        ((first[0] * first[1]).sum() + (second[0] ** 3).sum()).backward()
    joined = torch.cat(sums.unjoined.pop(unit.grad.data_ptr()))
    assert torch.equal(joined, plain.grad) and plain.grad.any()


def test_gpus_that_claim_to_share_memory_are_tried(monkeypatch):
    here = SimpleNamespace(rank=1, world_size=3, device=torch.device("cpu"))
    monkeypatch.setattr(train_llm.units, "everywhere", lambda here: here)

    def memory(*numbers):  # of this rank, by others; and that of others
        places = [torch.zeros(4), torch.tensor([*numbers, 0.0]), torch.zeros(4)]
        return lambda *_: SimpleNamespace(turn=lambda: places)

    def broken(*_):
        raise AttributeError("no such\ninterface")

    garbage = "of 3 numbers, [0.0, 1.0, 7.0] came"
    for stand_in, why in (
            (memory(0, 9, 2), ""), (broken, "no such"), (memory(0, 9, 7), garbage)):
        monkeypatch.setattr(train_llm.units, "NodeMemory", stand_in)
        assert train_llm.units.why_not_shared(here) == why
    assert not train_llm.units.have_atomics(0, 1)  # no GPU, no driver


def test_dropout_is_drawn_anew_each_step_and_the_same_each_run(runs):
    losses = [[row["loss"] for row in read_metrics(runs[name])[:3]]
              for name in ("dropout", "dropout-again", "two")]
    assert losses[0] == losses[1] != losses[2]


def test_random_weights_are_the_same_on_any_number_of_ranks(runs):
    first, third = (read_metrics(runs[name])[0]["loss"] for name in ("random-1", "random-3"))
    assert first == pytest.approx(third, rel=1e-6)
    assert first != pytest.approx(read_metrics(runs["one"])[0]["loss"], rel=1e-3)


def test_a_run_leaves_its_options_versions_metrics_and_model(runs, tiny):
    folder = runs["two"]
    args = json.loads((folder / "args.json").read_text())
    assert args["lr"] == LR and args["batch_size"] == 3 and args["model_name"] == str(tiny)
    versions = json.loads((folder / "versions.json").read_text())
    assert versions["torch"] == version("torch") and versions["world_size"] == 2
    row = read_metrics(folder)[-1]
    assert set(row) == {"step", "loss", "grad_norm", "lr", "tokens_per_second", "mfu",
                        "tokens_per_second_per_gpu", "step_seconds", "data_seconds", "save_seconds",
                        "forward_seconds", "backward_seconds", "update_seconds", "update_lost",
                        "peak_memory_gib", "epoch", "time"}
    assert row["mfu"] is None, "there is no GPU here, so no utilisation to speak of"
    assert row["tokens_per_second"] == pytest.approx(BATCH * LENGTH / row["step_seconds"])
    assert [r["lr"] for r in read_metrics(folder)][:4] == pytest.approx(
        [LR / 3, LR * 2 / 3, LR, LR])
    ids = [AutoTokenizer.from_pretrained(path)("the cat").input_ids
           for path in (folder / "model", tiny)]
    assert ids[0] == ids[1]
    assert {path.name for path in folder.iterdir()} == {
        "args.json", "versions.json", "metrics.jsonl", "model", "model-files", "checkpoints",
        "heartbeats"}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma", "mistral"])
def test_a_changed_first_document_leaves_the_logits_of_the_second_bit_equal(
    kind, attention, runs, corpus, rows_dir
):
    rows = train_llm.Rows(rows_folder(runs["models"][kind], corpus, rows_dir))
    row = next(i for i in range(len(rows)) if 8 < np.flatnonzero(rows.marks[i] & 1)[-1] < 24)
    second = np.flatnonzero(rows.marks[row] & 1)[-1]
    here = train_llm.planned_processes()
    tokens, _, positions, _ = rows.batch(np.array([row]), here)
    model = AutoModelForCausalLM.from_pretrained(
        runs["models"][kind], attn_implementation=attention
    )
    changed = tokens.clone()
    changed[0, :second] = (changed[0, :second] + 7) % 300

    def logits(ids, **given):
        return model(ids, use_cache=False, **given).logits[0, second:].detach()

    assert torch.equal(logits(tokens, position_ids=positions),
                       logits(changed, position_ids=positions))
    assert not torch.equal(logits(tokens), logits(changed)), "unmasked, they must differ"


@pytest.mark.parametrize("kind", ["llama", "gpt-oss", "gemma4", "mamba", "llama4"])
def test_without_document_mask_a_row_is_one_stretch_of_text(
    kind, tmp_path, tiny, corpus, rows_dir
):
    if kind != "llama":  # sinks, heads of several widths, no heads at all, chunks
        tiny = build_tiny_model(tmp_path / kind, kind)
    main_in_process(**RECIPE | dict(
        experiment_name="open", save_dir=tmp_path, rows_dir=rows_dir, model_name=tiny,
        dataset_name=corpus, document_mask=False, max_steps=1, ckpt_freq=0, export_dtype="none"))
    folder = download.rows_folder(model_name=str(tiny), dataset_name=str(corpus),
                                  seq_length=LENGTH, document_mask=False, rows_dir=rows_dir)
    rows = train_llm.Rows(folder)
    first = rows_of_step(0, rows=len(rows), global_batch_size=BATCH, seed=3)
    ids = torch.from_numpy(rows.tokens[first].astype(np.int64))
    model = AutoModelForCausalLM.from_pretrained(tiny)
    assert read_metrics(tmp_path / "open")[0]["loss"] == pytest.approx(
        model(ids, labels=ids).loss.item(), rel=1e-5)


@pytest.mark.parametrize("kind, suits", {
    "llama": True, "mistral": True, "mixtral": True, "qwen3_moe": True,
    "llama4_text": False,  # attends in chunks, by a mask alone
    "gemma2": False,  # caps its logits
    "gpt_oss": False, "deepseek_v3": False, "gemma4_text": False, "mamba": False}.items())
def test_varlen_is_for_models_whose_attention_it_computes(kind, suits):
    config = train_llm.AutoConfig.for_model(kind)
    assert train_llm.layers.suits_varlen(config) == suits


@pytest.mark.parametrize("kind", (
    "deepseek_v3 gemma3_text glm4_moe gpt2 granite llama4 mixtral olmo2 phi3 qwen3_moe seed_oss"
    " smollm3").split())
def test_models_of_many_kinds_are_taken_as_they_are(kind, tmp_path):
    build_tokenizer(tmp_path)
    assert try_models.try_kind(kind, tmp_path) == ("taken", "")


def test_a_model_whose_layers_share_parameters_is_refused(tmp_path, corpus):
    build_tiny_model(tmp_path)
    train_llm.AutoConfig.for_model(
        "zamba", vocab_size=320, hidden_size=48, intermediate_size=96, num_hidden_layers=6,
        num_attention_heads=4, n_mamba_heads=2, attn_layer_period=3,
        attn_layer_offset=1).save_pretrained(tmp_path)
    words = options_of(experiment_name="x", model_name=tmp_path, dataset_name=corpus,
                       document_mask=False, **RECIPE)
    shared = "shared_transf.* and .*shared_transf.* one parameter"
    with pytest.raises(train_llm.InputError, match=shared):
        train_llm.build_model(train_llm.parse_args(words))


def test_a_model_whose_head_reaches_into_the_decoder_is_refused(tmp_path, corpus):
    words = options_of(experiment_name="x", model_name=build_tiny_model(tmp_path, "opt"),
                       dataset_name=corpus, document_mask=False, **RECIPE)
    with pytest.raises(train_llm.InputError, match="OPTForCausalLM calls no decoder of its own"):
        train_llm.build_model(train_llm.parse_args(words))


@pytest.mark.parametrize("kind", ["gpt-oss", "falcon"])
def test_models_that_let_documents_see_each_other_are_refused(
    kind, tmp_path, corpus, rows_dir
):
    """Their masks do not heed positions that restart: seen in the logits, and told."""
    model = tmp_path / kind
    if kind == "gpt-oss":
        build_tiny_model(model, kind)
    else:
        build_tiny_model(model)
        small = dict(vocab_size=320, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
                     initializer_range=0.3)
        train_llm.AutoConfig.for_model("falcon", **small).save_pretrained(model)
        AutoModelForCausalLM.from_config(
            train_llm.AutoConfig.from_pretrained(model)).save_pretrained(model)
    ids = torch.arange(2, 22)[None]
    positions = torch.arange(20)[None] % 10
    with torch.no_grad():
        both, alone = (AutoModelForCausalLM.from_pretrained(model).eval()(
            ids[:, start:], position_ids=positions[:, start:], use_cache=False).logits[0, -10:]
            for start in (0, 10))
    assert not torch.allclose(both, alone, atol=1e-3)
    options = dict(experiment_name="x", save_dir=tmp_path, rows_dir=rows_dir, model_name=model,
                   dataset_name=corpus, **RECIPE)
    with pytest.raises(train_llm.InputError, match="masks without looking.*--no-document-mask"):
        train_llm.build_model(train_llm.parse_args(options_of(**options)))
    train_llm.build_model(train_llm.parse_args(options_of(**options, document_mask=False)))


def test_the_head_may_ask_the_decoder_for_a_number(tmp_path):
    """Falcon-H1's scales its logits by one of the decoder's."""
    build_tiny_model(tmp_path, "falcon-h1")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(2, 26)[None]
    wanted = whole(ids, labels=ids).loss
    whole.forward = train_llm.layers.build_forward(whole, chunk=7, document_mask=False)
    labels = torch.cat((ids[:, 1:], torch.tensor([[-100]])), dim=1)
    assert whole(ids, labels, None, None, 1 / 23).item() == pytest.approx(wanted.item(), rel=1e-5)


def watched_copies(monkeypatch):
    """HostCopies, and the list of what they fetch: of each tensor its first element."""
    copies, fetched = train_llm.layers.HostCopies("cpu"), []
    fetch = copies.fetch
    monkeypatch.setattr(copies, "fetch", lambda copy: (
        fetched.append(int(copy.host.flatten()[0])), fetch(copy)))
    return copies, fetched


def test_layer_inputs_come_back_from_host_memory_each_while_the_next_layer_computes(monkeypatch):
    copies, fetched = watched_copies(monkeypatch)
    inputs = [torch.full((3, 2), float(i)) for i in range(3)]
    kept = [copies.put(tensor) for tensor in inputs]
    for got, (wanted, sofar) in zip((2, 1, 0), ((2, [2, 1]), (1, [2, 1, 0]), (0, [2, 1, 0])),
                                    strict=True):
        assert copies.get(kept[got]).eq(wanted).all() and fetched == sofar
        assert kept[got].back is None, "what was got is not held a second time"
    assert copies.get(kept[1]).eq(1).all(), "and may be got again"
    before = copies.put(inputs[0])
    after = copies.put(inputs[1])
    del before  # its graph is gone, and so is its memory
    assert after.before() is None and copies.get(after).eq(1).all()


def test_layers_of_several_inputs_have_each_fetched_once_and_before_its_time(monkeypatch):
    copies, fetched = watched_copies(monkeypatch)
    kept = [copies.put(torch.tensor(i)) for i in range(6)]
    for i in (4, 5, 2, 3, 0, 1):  # three layers of two, of each of which the first comes first
        assert copies.get(kept[i]) == i
    assert fetched == [4, 3, 5, 2, 1, 0], "those of a layer while the layer behind it computes"
    assert all(copy.back is None for copy in kept), "a copy that nobody waits for is still written"


def test_each_epoch_sees_every_row_once_and_ranks_share_them_out():
    seen = [rows_of_step(s, rows=30, global_batch_size=12, seed=5) for s in range(5)]
    assert sorted(np.concatenate(seen).tolist()) == sorted([*range(30)] * 2)
    first = np.concatenate(seen)[:30].tolist()
    assert sorted(first) == [*range(30)] and first != [*range(30)]
    args = train_llm.argparse.Namespace(batch_size=2)
    for world_size in (1, 2, 3):
        ranks = [train_llm.Processes(rank, rank, world_size, 0, torch.device("cpu"))
                 for rank in range(world_size)]
        shares = [train_llm.rows_of_rank(seen[0], args, rank) for rank in ranks]
        assert np.stack(shares, axis=1).flatten().tolist() == seen[0].tolist()


def test_learning_rate_rises_linearly_then_falls_along_a_cosine():
    rate = [train_llm.lr_factor(s, warmup=4, steps=24, floor=0.1) for s in range(40)]
    assert rate[:5] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert rate[14] == pytest.approx(0.55)
    assert rate[24:] == pytest.approx([0.1] * 16)
    assert all(a >= b for a, b in zip(rate[4:], rate[5:], strict=False))


def test_flops_of_llama_405b_are_six_per_parameter_and_attention():
    config = train_llm.AutoConfig.for_model(
        "llama", hidden_size=16384, num_attention_heads=128, num_hidden_layers=126)
    found = train_llm.layers.flops_per_token(config, 403_752_042_496, 4096)
    assert found == pytest.approx(6 * 403.75e9 + 6 * 126 * 16384 * 4096, rel=1e-4)
    mixture = train_llm.AutoConfig.for_model("mixtral")
    assert train_llm.layers.flops_per_token(mixture, 1, 1) is None


def test_a_profile_that_the_disk_has_no_room_for_ends_no_training(tmp_path, caplog):
    class Profiler:
        def stop(self) -> None:
            pass

        def export_chrome_trace(self, path: str) -> None:
            raise OSError(28, "No space left on device")

    train_llm.layers.end_profile(Profiler(), tmp_path / "profile", 0)
    assert "the profile was not written" in caplog.text and "No space left" in caplog.text


class LayersDiffer:
    head_dim, num_hidden_layers = 64, 6

    @property
    def num_attention_heads(self) -> int:
        raise RuntimeError("differs by layer: ask each")  # as transformers 5.23 does, of dots3_note


def test_flops_are_unknown_where_layers_differ_in_their_heads():
    assert train_llm.layers.flops_per_token(LayersDiffer(), 1, 1) is None


def test_a_loss_that_is_not_finite_stops_every_rank_and_moves_no_weight(
    tmp_path, tiny, corpus, rows_dir
):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1, fused=True)
    state = train_llm.TrainState(model, optimizer)
    optimizer.found_inf = torch.zeros(())
    before = model.weight.clone()
    for loss in (math.nan, 1.0):  # the second step is finite, but comes after one that was not
        model(torch.ones(2)).sum().backward()
        state.hold_if_not_finite(torch.tensor(loss), torch.tensor(1.0))
        optimizer.step()
        assert torch.equal(model.weight, before)

    done = torchrun(2, "train_llm.py", *options_of(
        experiment_name="nan", save_dir=tmp_path, rows_dir=rows_dir, model_name=tiny,
        dataset_name=corpus, **RECIPE | {"lr": 1e30, "log_freq": 4, "max_grad_norm": 0,
                                         "ckpt_freq": 1, "async_checkpoint": "on"}))
    assert done.returncode != 0
    assert done.stderr.count("error: step ") == 1, done.stderr
    assert "No update was made" in done.stderr
    assert "(newest checkpoint: step 1)" in done.stderr  # which was in flight
    assert (tmp_path / "nan/checkpoints/step-00000001/.metadata").exists()
    assert "\ntrain_llm.py: error: " in done.stderr  # not behind the progress bar
    assert not (tmp_path / "nan" / "model").exists()
    beats = [json.loads(path.read_text()) for path in tmp_path.glob("nan/heartbeats/*")]
    assert {beat["phase"] for beat in beats} == {"failed"}


def test_a_stop_request_that_comes_while_a_run_loads_is_heeded(
    tmp_path, tiny, corpus, rows_dir, monkeypatch
):
    begin, folder = train_llm.begin_or_resume, tmp_path / "early"
    folder.mkdir()
    (folder / "stop-requested").touch()  # for a run before: not heeded

    def begin_late(*given):
        assert not (folder / "stop-requested").exists()
        (folder / "stop-requested").touch()
        return begin(*given)

    monkeypatch.setattr(train_llm, "begin_or_resume", begin_late)
    main_in_process(experiment_name="early", save_dir=tmp_path, rows_dir=rows_dir,
                    model_name=tiny, dataset_name=corpus, **RECIPE | {"max_steps": 6})
    assert [row["step"] for row in read_metrics(folder)] == [1, 2]
    assert (folder / "checkpoints/step-00000002/.metadata").exists()


def test_a_disk_that_fails_ends_neither_heartbeats_nor_the_look_for_a_stop_request(tmp_path):
    heart = train_llm.Heart(tmp_path, 9, train_llm.planned_processes())
    with open("/dev/full", "wb", buffering=0) as heart.file:
        heart.beat("training", 3)
    assert heart.step == 3
    stop = train_llm.StopRequest(tmp_path)
    stop.file = tmp_path / ("x" * 300)  # not "no such file": an OSError of another kind
    with pytest.raises(OSError, match="too long"):
        stop.file.stat()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0,
                                         world_size=1)
    try:
        assert stop.sum_over_ranks(torch.tensor(2.0)) == 2 and not stop.agreed()
    finally:
        torch.distributed.destroy_process_group()


def test_a_full_disk_of_logs_does_not_end_the_run(tmp_path, tiny, corpus, rows_dir):
    download.prepare_rows(model_name=str(tiny), dataset_name=str(corpus), seq_length=LENGTH,
                          rows_dir=rows_dir)
    words = options_of(experiment_name="deaf", save_dir=tmp_path, rows_dir=rows_dir,
                       model_name=tiny, dataset_name=corpus, export_dtype="none",
                       **RECIPE | {"max_steps": 3})
    done = run(["bash", "-c", 'exec "$@" 2> /dev/full', "-", sys.executable, "train_llm.py",
                *words])
    assert done.returncode == 0
    assert [row["step"] for row in read_metrics(tmp_path / "deaf")] == [1, 2, 3]


def test_weight_decay_leaves_vectors_alone_even_those_that_experts_stack(
    tmp_path, corpus, rows_dir
):
    model, found = build_tiny_model(tmp_path / "model", "gpt-oss"), []
    filled = AutoModelForCausalLM.from_pretrained(model)
    for parameter in filled.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # biases begin as zeros
    filled.save_pretrained(model)
    for decay in (0, 10):
        main_in_process(experiment_name=f"decay-{decay}", save_dir=tmp_path, rows_dir=rows_dir,
                        model_name=model, dataset_name=corpus, weight_decay=decay, **RECIPE | {
                            "max_steps": 1, "global_batch_size": 1, "warmup_steps": 0,
                            "document_mask": False})
        found.append(dict(AutoModelForCausalLM.from_pretrained(
            tmp_path / f"decay-{decay}/model").named_parameters()))
    same = {name for name in found[0] if torch.equal(found[0][name], found[1][name])}
    plain = {name for name in found[0] if name.endswith(("bias", "norm.weight", "sinks"))}
    assert plain == same and any(found[0][name].dim() == 2 for name in plain)


# --- bad input: (options, exit status, words that its one message must hold) -----------------

OPTION_ERRORS = {
    "batch does not divide": (dict(global_batch_size=7, batch_size=2), ["7", "multiple of 2"]),
    "negative lr": (dict(lr=-1), ["--lr", "-1", "0 or more"]),
    "not a number": (dict(lr="nan"), ["--lr", "nan"]),
    "bad choice": (dict(checkpoint_activations="maybe"), ["--checkpoint-activations", "maybe"]),
    "abbreviated": (dict(max_step=3), ["--max-step"]),
    "no effect on CPU": (dict(reduce_dtype="bfloat16"), ["no effect without a GPU"]),
    "nothing to write": (dict(async_checkpoint="on", ckpt_freq=0), ["no effect with --ckpt-freq"]),
    "nothing to keep": (dict(keep_checkpoints=3, ckpt_freq=0), ["no effect with --ckpt-freq"]),
    "large seed": (dict(seed=2**32), ["--seed", "less than 2**32"]),
    "more than all": (dict(val_fraction=1.5), ["--val-fraction 1.5", "below 1"]),
    "name with a slash": (dict(experiment_name="a/b"), ["a/b", "plain folder name"]),
}


@pytest.mark.parametrize("case", OPTION_ERRORS)
def test_a_bad_option_gets_one_message(case):
    options, words = OPTION_ERRORS[case]
    good = dict(experiment_name="x", model_name="m", dataset_name="d")
    with pytest.raises(train_llm.OptionError) as refused:
        train_llm.parse_args(options_of(**good | options))
    assert all(word in str(refused.value) for word in words), refused.value


def test_a_run_folder_that_only_seems_writable_is_one_error(tiny, corpus, rows_dir):
    """As root may write everywhere, and still the kernel says no."""
    with pytest.raises(train_llm.InputError, match="cannot write to /proc/none/x.*--save-dir"):
        main_in_process(experiment_name="x", save_dir="/proc/none", rows_dir=rows_dir,
                        model_name=tiny, dataset_name=corpus, **RECIPE)


def test_a_run_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(train_llm.OptionError, match="cannot write to .*file.*--save-dir"):
        train_llm.parse_args(options_of(experiment_name="x", model_name="m", dataset_name="d",
                                        save_dir=tmp_path / "file" / "below"))


def test_a_bad_option_leaves_with_status_2():
    done = run([sys.executable, "train_llm.py", "--lr", "fast"])
    assert done.returncode == 2
    assert done.stderr.startswith("train_llm.py: error:") and done.stderr.count("\n") == 1


def broken_models(folder, tiny):
    """{case: (folder of a model that cannot be trained, words of the message)}."""
    def copy(name):
        shutil.copytree(tiny, folder / name)
        return folder / name

    truncated = copy("truncated") / "model.safetensors"
    truncated.write_bytes(truncated.read_bytes()[:5000])
    (copy("no-weights") / "model.safetensors").unlink()
    config = copy("other-config") / "config.json"
    layers = '"num_hidden_layers": '
    config.write_text(config.read_text().replace(f"{layers}2", f"{layers}3"))
    (copy("bad-json") / "config.json").write_text("{")
    return {
        "truncated": ["cannot be read", "--random-init"],
        "no-weights": ["cannot be read", "no-weights"],
        "other-config": ["lack", "model.layers.2"],
        "bad-json": ["no readable Hugging Face model"],
        "absent": ["absent", "no readable Hugging Face model"],
    }


@pytest.fixture(scope="module")
def broken(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("broken")
    return folder, broken_models(folder, tiny)


@pytest.mark.parametrize("case", ["truncated", "no-weights", "other-config", "bad-json", "absent"])
def test_a_broken_model_folder_gets_one_message(case, broken, tmp_path, corpus, rows_dir):
    folder, words = broken
    with pytest.raises(train_llm.InputError) as refused:
        main_in_process(experiment_name="x", save_dir=tmp_path, rows_dir=rows_dir,
                        model_name=folder / case, dataset_name=corpus, **RECIPE)
    assert all(word in str(refused.value) for word in words[case]), refused.value
    assert "\n" not in str(refused.value)


def test_weights_that_cannot_be_read_leave_with_status_1(broken, tmp_path, corpus, rows_dir):
    done = run([sys.executable, "train_llm.py", *options_of(
        experiment_name="x", save_dir=tmp_path, rows_dir=rows_dir,
        model_name=broken[0] / "truncated", dataset_name=corpus, **RECIPE)])
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].startswith("train_llm.py: error: the weights of")
    assert done.stderr.count("error:") == 1 and "Traceback" not in done.stderr, done.stderr


def cases_for_one_process(tiny, corpus, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "short.jsonl").write_text('{"text": "the cat sees a dog and a green river"}\n' * 9)
    return {
        "past the limit": (dict(seq_length=256), ["256", "128 positions"]),
        "kernel": (dict(attn_implementation="flash_attention_2"), ["flash_attention_2", "sdpa"]),
        "unknown kernel": (dict(attn_implementation="nonsense"), ["nonsense"]),
        "no data": (dict(dataset_name=tmp_path / "none.jsonl"), ["none.jsonl"]),
        "too few rows": (dict(dataset_name=tmp_path / "short.jsonl", global_batch_size=64),
                         ["rows", "--global-batch-size 64"]),
    }


@pytest.mark.parametrize("case", ["past the limit", "kernel", "unknown kernel", "no data",
                                  "too few rows"])
def test_what_cannot_run_gets_one_message(case, tiny, corpus, rows_dir, tmp_path):
    options, words = cases_for_one_process(tiny, corpus, tmp_path)[case]
    with pytest.raises(train_llm.InputError) as refused:
        main_in_process(**dict(experiment_name="x", save_dir=tmp_path / "out", rows_dir=rows_dir,
                               model_name=tiny, dataset_name=corpus) | RECIPE | options)
    assert all(word in str(refused.value) for word in words), refused.value
    assert not (tmp_path / "out" / "x" / "metrics.jsonl").exists()


def test_rows_made_for_a_model_of_more_tokens_are_refused(tiny, corpus, rows_dir, tmp_path):
    download.prepare_rows(model_name=str(tiny), dataset_name=str(corpus), seq_length=LENGTH,
                          rows_dir=rows_dir)
    smaller = shutil.copytree(tiny, tmp_path / "smaller")  # with the same tokenizer
    config = json.loads((smaller / "config.json").read_text())
    (smaller / "config.json").write_text(json.dumps(config | {"vocab_size": 290}))
    with pytest.raises(train_llm.InputError, match="token id 3.*has 290 rows"):
        main_in_process(experiment_name="x", save_dir=tmp_path, rows_dir=rows_dir, random_init=None,
                        model_name=smaller, dataset_name=corpus, **RECIPE)


@pytest.mark.parametrize("damage", {
    "tokens.bin has 8 bytes": lambda folder: os.truncate(folder / "tokens.bin", 8),
    "targets.bin has 8 bytes": lambda folder: os.truncate(folder / "targets.bin", 8),
    "marks.bin": lambda folder: (folder / "marks.bin").unlink(),
    "line 1": lambda folder: (folder / "meta.json").write_text("{"),
}.items(), ids=lambda damage: damage[0].split()[0])
def test_rows_that_a_copy_cut_short_are_named(damage, tiny, corpus, rows_dir, tmp_path):
    whole = download.prepare_rows(model_name=str(tiny), dataset_name=str(corpus),
                                  seq_length=LENGTH, rows_dir=rows_dir)
    folder = shutil.copytree(whole, tmp_path / "rows")
    train_llm.Rows(folder)
    words, harm = damage
    harm(folder)
    with pytest.raises(train_llm.InputError, match=f"{folder} are damaged.*{words}.*remove that"):
        train_llm.Rows(folder)


@pytest.mark.drill
def test_under_torchrun_one_rank_speaks_and_none_hangs(tmp_path, tiny, rows_dir):
    started = time.monotonic()
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "the cat"}\n' * 3 + '{"text": \n' + '{"text": "a dog"}\n')
    done = torchrun(2, "train_llm.py", *options_of(
        experiment_name="x", save_dir=tmp_path, rows_dir=rows_dir, model_name=tiny,
        dataset_name=broken, **RECIPE))
    assert done.returncode != 0
    assert done.stderr.count("train_llm.py: error:") == 1, done.stderr
    assert "line 4" in done.stderr and "broken.jsonl" in done.stderr
    assert time.monotonic() - started < 60
    assert not [path for path in rows_dir.iterdir() if path.name.startswith("broken")
                and path.is_dir()]


def test_check_says_what_would_run_and_touches_nothing(
    tmp_path, tiny, corpus, capsys, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", "3")
    train_llm.main(["--check", *options_of(
        experiment_name="x", save_dir=tmp_path / "out", rows_dir=tmp_path / "rows",
        model_name=tiny, dataset_name=corpus, **RECIPE)])
    said = capsys.readouterr().out
    for words in ("LlamaForCausalLM", "3 on cpu", "6 rows = 192 tokens", "compute float32", "sdpa"):
        assert words in said, said
    assert not list(tmp_path.iterdir())


def test_nothing_of_the_script_is_longer_than_a_screen():
    import ast

    tree = ast.parse((ROOT / "train_llm.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name != "parse_args":
            assert node.end_lineno - node.lineno < 60, node.name
