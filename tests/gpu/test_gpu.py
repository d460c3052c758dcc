"""The script on one and two GPUs, over NCCL. Left out of the ordinary run; by hand, on such a node:

    python -m pytest tests/gpu -m gpu -s

Every tiny run is 10 steps in bfloat16. Losses are held against float32 ones of plain PyTorch.
"""

import gzip
import json
import math
import shutil
import statistics
from importlib.util import find_spec
from pathlib import Path

import pytest
import reference
import torch
from conftest import build_tiny_model, on_ranks, options_of, read_metrics, torchrun
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import is_flash_attn_2_available

import download
import train_llm
from rows import rows_of_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]
GPUS = torch.cuda.device_count()
STEPS, BATCH, LENGTH, LR = 10, 4, 32, 1e-3
RECIPE = dict(seq_length=LENGTH, global_batch_size=BATCH, max_steps=STEPS, lr=LR, warmup_steps=3,
              log_freq=1, seed=3)
needs_two = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny, corpus, rows_dir):
    """{name: folder} of runs on one GPU and, where there are two, on two."""
    folder = tmp_path_factory.mktemp("runs")
    # heads of 16: flash attention wants a multiple of 8; those of `tiny` have 12
    models = {"llama": build_tiny_model(folder / "llama-model", head_dim=16),
              "gemma": build_tiny_model(folder / "gemma-model", "gemma")}
    for model in models.values():
        download.prepare_rows(model_name=str(model), dataset_name=str(corpus), seq_length=LENGTH,
                              rows_dir=rows_dir)
    options = {
        "plain": dict(batch_size=2),
        "again": dict(batch_size=2),
        "by-nccl": dict(batch_size=2),
        "accumulated": dict(batch_size=1),
        "on": dict(batch_size=2, checkpoint_activations="on"),
        "offload": dict(batch_size=2, checkpoint_activations="offload"),
        "prefetch": dict(batch_size=2, forward_prefetch=True),
        "unlimited": dict(batch_size=2, limit_all_gathers=False),
        "embedding-in-root": dict(batch_size=2, wrap_embedding=False),
        "reduce-bfloat16": dict(batch_size=2, reduce_dtype="bfloat16"),
        "selective": dict(batch_size=2, checkpoint_activations="selective"),
        "chunked": dict(batch_size=2, loss_chunk=7),
        "sdpa": dict(batch_size=2, attn_implementation="sdpa"),
        "eager": dict(batch_size=2, attn_implementation="eager"),
        "compiled": dict(batch_size=2, compile=True),
        "compiled-accumulated": dict(batch_size=1, compile=True, val_dataset_name=corpus),
        "compiled-selective": dict(batch_size=2, compile=True, checkpoint_activations="selective"),
        "compiled-offload": dict(batch_size=2, compile=True, checkpoint_activations="offload"),
        "no-sync": dict(batch_size=1, log_freq=10, profile=4, checkpoint_activations="offload"),
        "all-on-the-host": dict(batch_size=1, cpu_offload="on", val_dataset_name=corpus),
        "compiled-all-on-the-host": dict(batch_size=1, compile=True, cpu_offload="on",
                                         val_dataset_name=corpus),
        "adamw-on-the-host": dict(batch_size=1, cpu_offload="optimizer", val_dataset_name=corpus),
        "gemma": dict(batch_size=2, model_name=models["gemma"]),
        "random": dict(batch_size=2, random_init=True),
        "sdpa-open": dict(batch_size=2, attn_implementation="sdpa", document_mask=False),
    }
    if is_flash_attn_2_available():
        flash = dict(batch_size=2, attn_implementation="flash_attention_2")
        options |= {"flash": flash, "flash-open": flash | dict(document_mask=False)}
    names = {}
    for ranks in (1, 2)[:GPUS]:
        jobs = []
        for name, extra in options.items():
            if name.startswith("compiled") and ranks == 1 and name != "compiled-accumulated":
                continue  # to compile takes long
            names[name, ranks] = folder / f"{name}-{ranks}"
            jobs.append({
                "do": "train", "no_sync": name == "no-sync",
                "copies": "nccl" if name == "by-nccl" else "", "argv": options_of(**dict(
                    experiment_name=f"{name}-{ranks}", save_dir=folder, rows_dir=rows_dir,
                    model_name=models["llama"], dataset_name=corpus) | RECIPE | extra)})
        on_ranks(ranks, jobs, folder)
    return names | {"models": models}


def losses(folder) -> list[float]:
    return [row["loss"] for row in read_metrics(folder)]


def test_losses_on_gpus_are_those_of_plain_pytorch_up_to_bfloat16(runs, corpus, rows_dir):
    for kind, model in runs["models"].items():
        folder = download.rows_folder(model_name=str(model), dataset_name=str(corpus),
                                      seq_length=LENGTH, rows_dir=rows_dir)
        rows = train_llm.Rows(folder)
        order = [rows_of_step(step, rows=len(rows), global_batch_size=BATCH, seed=3)
                 for step in range(STEPS)]
        wanted, _, _ = reference.train(model, rows.tokens, rows.marks, order=order, lr=LR, warmup=3)
        for (name, ranks), run in ((k, v) for k, v in runs.items() if k != "models"):
            if name not in ("random", "no-sync", "sdpa-open", "flash-open") and (
                    name == "gemma") == (kind == "gemma"):
                print(f"{name:>18} {ranks} GPU, largest difference"
                      f" {max(abs(a - b) for a, b in zip(losses(run), wanted, strict=True)):.4f}")
                assert losses(run) == pytest.approx(wanted, rel=5e-3), (name, ranks)


def test_options_that_only_move_memory_change_not_one_bit(runs):
    far = {(name, ranks): max(abs(a - b) for a, b in zip(
        losses(runs[name, ranks]), losses(runs["plain", ranks]), strict=True))
        for ranks in (1, 2)[:GPUS]
        for name in ("again", "by-nccl", "on", "offload", "selective", "prefetch", "unlimited",
                     "embedding-in-root")}
    # Units cut in other places: each rank's norm is of other parameters, and rounds differently.
    cut_otherwise = far.pop(("embedding-in-root", 2), 0)
    assert not any(far.values()) and cut_otherwise < 1e-3, (far, cut_otherwise)


@pytest.mark.skipif(not is_flash_attn_2_available(), reason="flash-attn is not installed")
def test_flash_attn_gives_the_losses_of_pytorchs_kernels_packed_and_unpacked(runs):
    for ranks in (1, 2)[:GPUS]:
        for name, other in (("flash", "sdpa"), ("flash-open", "sdpa-open")):
            found, wanted = losses(runs[name, ranks]), losses(runs[other, ranks])
            print(name, ranks, max(abs(a - b) for a, b in zip(found, wanted, strict=True)))
            assert found == pytest.approx(wanted, rel=5e-3)
        assert losses(runs["flash", ranks])[0] != losses(runs["flash-open", ranks])[0]


def test_a_step_never_waits_for_the_gpu_and_its_profile_is_written(runs):
    for ranks in (1, 2)[:GPUS]:  # waiting would have raised: see on_ranks.py
        folder = runs["no-sync", ranks]
        assert [row["step"] for row in read_metrics(folder)] == [10]
        trace = json.loads(gzip.decompress((folder / "profile" / "trace-0.json.gz").read_bytes()))
        assert any("AdamW" in event["name"] for event in trace["traceEvents"])
        assert (folder / "profile" / "memory-0.pickle").stat().st_size > 0


def test_documents_do_not_see_each_other_in_the_varlen_kernel(runs):
    """Logits of a row of two documents are those of each alone."""
    model = AutoModelForCausalLM.from_pretrained(
        runs["models"]["llama"], attn_implementation="varlen", dtype=torch.bfloat16).cuda()

    def logits(tokens, *cuts):
        cuts = torch.tensor(cuts, dtype=torch.int32, device="cuda")
        positions = torch.cat([torch.arange(n) for n in cuts.diff().tolist()]).cuda()
        return model(tokens[None], position_ids=positions[None], cu_seq_lens_q=cuts,
                     cu_seq_lens_k=cuts, max_length_q=40, max_length_k=40).logits[0]

    tokens = torch.randint(2, 300, (40,), device="cuda")
    both = logits(tokens, 0, 15, 40)
    apart = torch.cat([logits(tokens[:15], 0, 15), logits(tokens[15:], 0, 25)])
    torch.testing.assert_close(both, apart)
    padded = logits(tokens, 0, 15, 40, 40, 40)
    assert torch.equal(both, padded)


@needs_two
def test_random_weights_are_the_same_on_one_gpu_and_two(runs):
    one, two = losses(runs["random", 1])[0], losses(runs["random", 2])[0]
    assert one == pytest.approx(two, rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma"])
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=needs_two)])
def test_pretrained_weights_arrive_bit_for_bit(ranks, kind, tmp_path, corpus):
    jobs, outs = [], []
    for dtype in ("float32", "bfloat16"):
        model = build_tiny_model(tmp_path / f"{kind}-{dtype}", kind, dtype=dtype)
        for load in ("spread", "rank0"):
            outs.append(tmp_path / f"{dtype}-{load}")
            jobs.append({"do": "compare", "out": str(outs[-1]), "argv": options_of(
                experiment_name="x", model_name=model, dataset_name=corpus, global_batch_size=2,
                seq_length=LENGTH, load=load)})
    on_ranks(ranks, jobs, tmp_path)
    for out in outs:
        for rank in range(ranks):
            report = json.loads(Path(f"{out}.{rank}").read_text())
            assert report["different"] == report["extra"] == report["meta"] == [], (out, rank)


@needs_two
def test_gradients_are_summed_in_float32_within_and_between_nodes(tmp_path):
    on_ranks(GPUS, [{"do": "add_up", "out": str(tmp_path / "sums")}], tmp_path)
    for rank in range(GPUS):
        far = json.loads((tmp_path / f"sums.{rank}").read_text())
        assert far and all(error < 2e-6 for error in far.values()), far


def test_a_loss_that_is_not_finite_stops_every_rank(tmp_path, tiny, corpus, rows_dir):
    done = torchrun(GPUS and min(GPUS, 2), "train_llm.py", *options_of(
        experiment_name="nan", save_dir=tmp_path, rows_dir=rows_dir, model_name=tiny,
        dataset_name=corpus, **RECIPE | {"lr": 1e30, "log_freq": 4, "max_grad_norm": 0}))
    assert done.returncode != 0
    assert done.stderr.count("error: step ") == 1, done.stderr[-3000:]
    assert not (tmp_path / "nan" / "model").exists()


@pytest.fixture(scope="module")
def wide(tmp_path_factory, rows_dir) -> dict:
    """Options to train four layers of Llama 3.1 8B's width on 4,096 tokens a row."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("wide")
    download.prepare_demo(folder / "demo")
    model = build_tiny_model(folder / "slice")  # for its tokenizer
    (model / "model.safetensors").unlink()
    LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=4, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192,
    ).save_pretrained(model)
    return dict(
        save_dir=folder, rows_dir=rows_dir, model_name=model, random_init=True, seq_length=4096,
        dataset_name=folder / "demo" / "corpus.jsonl", export_dtype="none", ckpt_freq=0,
        global_batch_size=min(GPUS, 2), max_steps=15)


def test_8b_wide_layers_train_and_their_figures_are_sane(wide):
    for mode in ("off", "on"):
        done = torchrun(min(GPUS, 2), "train_llm.py", *options_of(
            experiment_name=mode, log_freq=5, checkpoint_activations=mode, **wide))
        assert done.returncode == 0, done.stderr[-3000:]
        row = read_metrics(wide["save_dir"] / mode)[-1]
        print(f"activation checkpointing {mode}:", json.dumps(row))
        print(json.loads((wide["save_dir"] / mode / "versions.json").read_text()))
        assert 0.1 < row["mfu"] < 0.8
        assert row["data_seconds"] < 0.05 * row["step_seconds"]


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
def test_float8_trains_8b_wide_layers_as_bfloat16_does(wide):
    """Without the rounding that layers.in_float8 asks for, rowwise's first gradient is infinite.

    Weights drift apart where the loss falls by halves within a few steps, so that later losses are
    held to each other by their mean."""
    runs = {float8: wide["save_dir"] / f"float8-{float8}"
            for float8 in ("off", "tensorwise", "rowwise")}
    on_ranks(min(GPUS, 2), [{"do": "train", "argv": options_of(
        experiment_name=run.name, float8=float8, compile=True, checkpoint_activations="on",
        log_freq=1, **wide)} for float8, run in runs.items()], wide["save_dir"])
    for float8, run in runs.items():
        norms = [row["grad_norm"] for row in read_metrics(run)]
        print(f"float8 {float8}: losses", losses(run), "gradient norms", norms)
        assert all(map(math.isfinite, norms))
        found, plain = losses(run), losses(runs["off"])
        assert found[:5] == pytest.approx(plain[:5], rel=0.02)
        assert statistics.mean(found[5:]) == pytest.approx(statistics.mean(plain[5:]), rel=0.02)


@pytest.mark.parametrize("mode", ["off", "on"])
def test_a_run_resumes_on_the_same_and_on_another_number_of_gpus(
    mode, tmp_path, tiny, corpus, rows_dir
):
    def job(name, **options):
        return {"do": "train", "argv": options_of(**dict(
            experiment_name=name, save_dir=tmp_path, rows_dir=rows_dir, model_name=tiny,
            dataset_name=corpus, batch_size=1, ckpt_freq=5, async_checkpoint=mode)
            | RECIPE | options)}

    for ranks in (1, 2)[:GPUS]:
        on_ranks(ranks, [job(f"straight-{ranks}")], tmp_path)
        straight, exported = tmp_path / f"straight-{ranks}", tmp_path / f"exported-{ranks}"
        train_llm.main(options_of(export=straight, to=exported))
        wanted, found = ({name: tensor for file in folder.glob("*.safetensors")
                          for name, tensor in load_file(file).items()}
                         for folder in (straight / "model", exported))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        for other in (1, 2)[:GPUS]:
            folder = tmp_path / f"{ranks}-to-{other}"
            shutil.copytree(tmp_path / f"straight-{ranks}", folder)
            shutil.rmtree(folder / "checkpoints" / "step-00000010")
            on_ranks(other, [job(folder.name)], tmp_path)
            wanted, found = losses(tmp_path / f"straight-{ranks}"), losses(folder)
            print(f"{ranks} to {other} GPUs, asynchronous {mode}: {found == wanted}")
            assert found[:5] == wanted[:5]
            assert found == wanted if other == ranks else found == pytest.approx(wanted, rel=1e-3)
