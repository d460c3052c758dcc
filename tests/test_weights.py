"""Loading: weights arrive bit for bit by every way, a byte is read once, errors name the file."""

import itertools
import json
import shutil
import threading
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from conftest import build_tiny_model, on_ranks, options_of, run_on_ranks, write_corpus
from safetensors.torch import load_file, save_file

import train_llm
import weights

HERE = train_llm.planned_processes()
MODELS = {  # name: (kind, dtype, bytes of a file at most, changes of the shape)
    "one file": ("llama", "float32", "1GB", dict(  # odd sizes, which FSDP pads
        hidden_size=50, num_attention_heads=5, num_key_value_heads=1, intermediate_size=97)),
    "many files": ("llama", "bfloat16", "30KB", {}),
    "tied": ("gemma", "bfloat16", "30KB", {}),
    "tied, one file": ("gemma", "float32", "1GB", {}),
    "other names": ("mixtral", "bfloat16", "30KB", {}),
}
# (ranks, model or nodes, --load); auto takes spread wherever that is possible.
CASES = [*itertools.product((1, 2, 3), MODELS, ("auto", "rank0")),
         *itertools.product((2, 3, 4), ("split", "first only"), ("auto",)),
         *itertools.product((2, 3, 4), ("first only",), ("rank0",)),
         *itertools.product((4,), ("one file", "tied"), ("auto", "rank0"))]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    made = {}
    for name, (kind, dtype, file_bytes, changes) in MODELS.items():
        path = folder / name.replace(" ", "-")
        made[name] = build_tiny_model(path, kind, dtype=dtype, file_bytes=file_bytes, **changes)
    return made


@pytest.fixture(scope="module")
def nodes(models, tmp_path_factory) -> dict[str, list[Path]]:
    """Two nodes that have alternate files of a model, and two of which only the first has any."""
    whole, folder = models["many files"], tmp_path_factory.mktemp("nodes")
    made = {"split": [folder / "even", folder / "odd"], "first only": [whole, folder / "none"]}
    for path in (*made["split"], folder / "none"):
        shutil.copytree(whole, path)
    for node in (0, 1):
        for file in sorted(made["split"][node].glob("*.safetensors"))[1 - node :: 2]:
            file.unlink()
    for file in (folder / "none").glob("*.safetensors*"):
        file.unlink()
    return made


@pytest.fixture(scope="module")
def arrived(models, nodes, tmp_path_factory) -> dict[tuple, list[dict]]:
    """{case: reports of all ranks}, by one start of four processes."""
    folder, jobs = tmp_path_factory.mktemp("arrived"), {}
    corpus = write_corpus(folder / "corpus.jsonl")
    for ranks, name, load in CASES:
        jobs[ranks, name, load] = job = dict(
            do="compare", ranks=ranks, out=str(folder / str(len(jobs))), piece_bytes=4096,
            argv=options_of(
                experiment_name="x", model_name=models.get(name, models["many files"]), load=load,
                dataset_name=corpus, seq_length=32, global_batch_size=12))
        if name in nodes:
            job["nodes"] = list(map(str, nodes[name]))
    sums = {"do": "add_up", "out": str(folder / "sums")}
    on_ranks(4, [sums, *jobs.values()], folder)
    jobs[4, "sums", "added"] = sums
    return {case: [json.loads(Path(f"{job['out']}.{rank}").read_text())
                   for rank in range(case[0])] for case, job in jobs.items()}


def test_gradients_are_summed_in_float32_within_and_between_nodes(arrived):
    for far in arrived[4, "sums", "added"]:
        assert len(far) == 8 and all(error < 1e-6 for error in far.values()), far


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_weights_arrive_bit_for_bit(case, arrived):
    for report in arrived[case]:
        assert report["compared"] > 10
        assert report["different"] == report["extra"] == report["meta"] == []
        assert report["way"] == arrived[case][0]["way"]


def test_the_way_is_chosen_by_where_the_files_are(arrived):
    ways = {case: arrived[case][0]["way"] for case in CASES}
    assert "auto): every rank sees" in ways[3, "many files", "auto"]
    assert "rank 0 reads" in ways[3, "many files", "rank0"]
    assert "through from_pretrained, since transformers converts" in ways[3, "other names", "auto"]
    assert "2 of 2 nodes, not all on each; 3 ranks" in ways[3, "split", "auto"]
    assert "1 of 2 nodes, not all on each; 2 ranks" in ways[3, "first only", "auto"]


def decide(folders: list[Path], load: str = "auto", of: Path | None = None) -> weights.Plan:
    """The plan for one rank on each of several nodes, whose model folders these are."""
    args = Namespace(model_name=str(of or folders[0]), load=load, random_init=False)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(args.model_name))
    seen = [weights.look(str(folder), replace(HERE, node=node))
            for node, folder in enumerate(folders)]
    return weights.decide(model, args, json.loads(json.dumps(seen)))


def refused(*folders: Path, **options) -> str:
    with pytest.raises(train_llm.InputError) as error:
        decide(list(folders), **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def copy(models, tmp_path) -> Path:
    """A copy of the model in many files, to break."""
    return shutil.copytree(models["many files"], tmp_path / "copy")


def rewrite(folder: Path, change) -> tuple[str, str]:
    """Write a folder's first file anew, its first tensor given to `change`; (file, tensor)."""
    path = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(path)
    name = sorted(tensors)[0]
    change(tensors, name)
    save_file(tensors, path, metadata={"format": "pt"})
    return path.name, name


def test_a_truncated_file_is_named_with_the_bytes_it_should_have(copy):
    path = sorted(copy.glob("*.safetensors"))[1]
    size = path.stat().st_size
    with path.open("rb+") as file:
        file.truncate(size - 100)
    message = refused(copy)
    assert path.name in message and f"{size - 100} bytes" in message and f"{size}" in message


def test_a_file_that_is_no_safetensors_file_is_named(copy):
    path = sorted(copy.glob("*.safetensors"))[1]
    path.write_bytes(b"<html>not found</html>" * 50)
    assert f"{path.name} on " in refused(copy) and "is broken" in refused(copy)


def test_a_tensor_that_the_index_promises_and_a_file_lacks_is_named_with_it(copy):
    file, tensor = rewrite(copy, lambda tensors, name: tensors.pop(name))
    assert f"{file} lacks {tensor}" in refused(copy)


def test_a_tensor_of_the_wrong_shape_is_named_with_its_file(copy):
    def shorten(tensors, name):
        tensors[name] = tensors[name][:-1].clone()

    file, tensor = rewrite(copy, shorten)
    assert f"{tensor} in {file}" in refused(copy)


def test_a_file_that_no_node_has_is_named(nodes):
    even, odd = nodes["split"]
    missing = sorted(odd.glob("*.safetensors"))
    message = refused(even, even)
    assert f"no node has {len(missing)} of its files, the first {missing[0].name}" in message


def test_files_that_differ_between_nodes_are_refused(models, copy):
    def shorten(tensors, name):
        tensors[name] = tensors[name][:-1].clone()

    file, _ = rewrite(copy, shorten)
    assert f"{file} is not the same on nodes 1 and 0" in refused(models["many files"], copy)


def test_a_forced_way_that_the_files_do_not_allow_is_refused(models, nodes):
    split, away = nodes["split"], sorted(nodes["split"][1].glob("*.safetensors"))
    message = refused(*split, load="rank0")
    assert f"the first {away[0].name}; copy them there, or use --load spread" in message
    assert "transformers converts" in refused(models["other names"], load="spread")
    with pytest.raises(train_llm.OptionError, match="no effect with --random-init"):
        train_llm.parse_args(options_of(experiment_name="x", model_name="m", dataset_name="d",
                                        random_init=None, load="rank0"))


def test_what_rank_0_needs_to_convert_a_model_is_told(models, caplog):
    with caplog.at_level("INFO", "train_llm"):
        decide([models["other names"]])
    assert "GB of host memory for the whole model, since transformers converts" in caplog.text


def test_spread_is_what_auto_does(models):
    forced, chosen = (decide([models["tied"]] * 3, load) for load in ("spread", "auto"))
    assert forced.readers == chosen.readers and forced.tensors == chosen.tensors


def test_a_tied_model_whose_files_hold_two_tensors_is_refused(models, tmp_path):
    folder = shutil.copytree(models["tied, one file"], tmp_path / "two")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "tie_word_embeddings" in refused(folder)


def test_a_file_cut_short_while_it_is_read_is_named_with_the_tensor(copy):
    plan = decide([copy])
    name, stored = next(iter(plan.tensors.items()))
    (copy / stored.file).write_bytes((copy / stored.file).read_bytes()[: stored.start + 10])
    read = weights.file_reader(plan, copy)
    with pytest.raises(train_llm.InputError, match=f"{stored.file} .* at {name}: it ends at byte"):
        read(weights.Piece(name, 0, 100, None), torch.empty(1 << 20, dtype=torch.uint8))


def test_a_broken_file_ends_all_ranks_with_one_message(copy, tmp_path):
    with sorted(copy.glob("*.safetensors"))[1].open("rb+") as file:
        file.truncate(100)
    done = run_on_ranks(2, "train_llm.py", *options_of(
        experiment_name="x", save_dir=tmp_path, rows_dir=tmp_path / "rows", model_name=copy,
        dataset_name=write_corpus(tmp_path / "corpus.jsonl"), seq_length=32, global_batch_size=2))
    assert done.returncode == 1
    assert done.stderr.count("error: the weights of") == 1, done.stderr[-2000:]


def test_many_threads_may_need_a_file_at_once(models):
    plan = decide([models["many files"]])
    name, stored = next(iter(plan.tensors.items()))
    path = models["many files"] / stored.file
    wanted = path.read_bytes()[stored.start : stored.start + 200]
    for _ in range(20):
        read, together = weights.file_reader(plan, path.parent), threading.Barrier(16)

        def work(_, read=read, together=together):
            slot = torch.empty(1 << 12, dtype=torch.uint8)
            together.wait()
            return bytes(slot[: read(weights.Piece(name, 0, 100, None), slot)].numpy())

        with ThreadPoolExecutor(16) as threads:
            assert set(threads.map(work, range(16))) == {wanted}


def layer_of_405b() -> dict[str, torch.Tensor]:
    config = transformers.LlamaConfig(
        hidden_size=16384, intermediate_size=53248, num_attention_heads=128,
        num_key_value_heads=8, num_hidden_layers=1, vocab_size=8)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return dict(model.model.layers[0].named_parameters())


def test_each_byte_of_a_405b_layer_is_read_by_one_of_64_ranks_and_all_are_read():
    layer, ranks = layer_of_405b(), 64
    stored = {name: weights.Stored("f", "BF16", list(p.shape), 0) for name, p in layer.items()}
    shared = weights.Plan("", stored, {"f": [*range(ranks)]})
    first_node = weights.Plan("", stored, {"f": [*range(8)]})
    whole = sum(p.numel() for p in layer.values())
    for plan, most in ((shared, 1.0001), (first_node, 1)):
        read = {name: [] for name in layer}
        for rank in range(ranks):
            here = replace(HERE, rank=rank, world_size=ranks)
            for piece in weights.plan_unit(layer, plan, itertools.count(), here):
                if piece.reader in (None, rank):
                    read[piece.name].append((piece.first, piece.last))
        for name, parts in read.items():
            parts.sort()
            assert parts[0][0] == 0 and parts[-1][1] == layer[name].numel()
            assert all(a[1] >= b[0] for a, b in itertools.pairwise(parts))
        total = sum(last - first for parts in read.values() for first, last in parts)
        assert 1 <= total / whole <= most


def test_reading_ahead_keeps_the_order_and_no_more_than_its_slots(monkeypatch):
    pieces = [weights.Piece(str(i), 0, i, None) for i in range(200)]
    begun = []

    def read(piece, slot):
        begun.append(piece)
        slot[:4] = int(piece.name)
        return 4

    monkeypatch.setitem(weights.PIECE_BYTES, "cpu", 64)
    ahead = weights.ReadAhead(pieces, read, torch.device("cpu"))
    for taken, piece in enumerate(pieces):
        assert ahead.take(piece).tolist() == [int(piece.name)] * 4
        assert len(begun) <= taken + weights.SLOTS
    ahead = weights.ReadAhead(pieces, read, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="another order"):
        ahead.take(pieces[1])


def test_values_that_are_not_finite_are_found():
    whole = torch.ones(1000)
    assert weights.is_finite(whole) and weights.is_finite(whole[:0])
    for bad in ("nan", "inf", "-inf"):
        whole[7] = float(bad)
        assert not weights.is_finite(whole)
        whole[7] = 0


def test_a_buffer_that_nothing_computes_is_not_finite_rather_than_what_lay_in_memory():
    with torch.device("meta"):
        module = torch.nn.Linear(2, 2)
        module.register_buffer("scales", torch.ones(3), persistent=False)
    module.register_buffer("known", torch.ones(3), persistent=False)  # not on meta
    weights.give_storage([module], {}, lambda meta: torch.zeros_like(meta, device="cpu"))
    assert module.scales.isnan().all() and module.known.eq(1).all()
    assert module.weight.eq(0).all()
