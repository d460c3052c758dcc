"""What `train_llm.py --check` finds out about the node it runs on, before anything is started."""

import shutil

import pytest
from conftest import build_tiny_model, options_of

import checkpoints
import train_llm
import weights


@pytest.fixture(scope="module")
def in_pieces(tmp_path_factory):
    """A model whose weights lie in several files, as those of large models do."""
    import transformers

    folder = build_tiny_model(tmp_path_factory.mktemp("pieces") / "llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def check(model, corpus, folder, **options) -> None:
    train_llm.main(["--check", *options_of(
        experiment_name="new", model_name=model, dataset_name=corpus, save_dir=folder / "outputs",
        rows_dir=folder / "rows", seq_length=32, global_batch_size=2, **options)])


def refusal(*args, **options) -> str:
    with pytest.raises(train_llm.InputError) as error:
        check(*args, **options)
    return str(error.value)


def test_weights_that_are_all_there_pass(in_pieces, corpus, tmp_path, capsys):
    check(in_pieces, corpus, tmp_path)
    assert "this run" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["missing", "cut short", "empty"])
def test_a_file_of_weights_that_is_not_whole_is_named(in_pieces, corpus, tmp_path, damage):
    model = shutil.copytree(in_pieces, tmp_path / "model")
    files = sorted(model.glob("model-*.safetensors"))
    if damage == "missing":
        files[1].unlink()
    else:
        files[1].write_bytes(files[1].read_bytes()[: -1 if damage == "cut short" else 0])
    said = refusal(model, corpus, tmp_path)
    assert f"1 of the {len(files)} files of weights in {model} are missing or cut short" in said
    assert f"the first {files[1].name}; copy the model's files again" in said


def test_only_the_node_of_rank_0_needs_weights_and_a_random_start_none(
    in_pieces, corpus, tmp_path, monkeypatch
):
    model = shutil.copytree(in_pieces, tmp_path / "model")
    for path in model.glob("model*"):
        path.unlink()
    assert "has no weights (model.safetensors)" in refusal(model, corpus, tmp_path)
    check(model, corpus, tmp_path, random_init=None)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    check(model, corpus, tmp_path)


def test_a_node_of_several_tells_what_it_has_and_needs_no_more(
    in_pieces, corpus, tmp_path, monkeypatch, capsys
):
    def told(**options) -> str:
        check(model, corpus, tmp_path, **options)
        return capsys.readouterr().out.partition("weights-here ")[2].strip()

    model = shutil.copytree(in_pieces, tmp_path / "model")
    files = sorted(model.glob("model-*.safetensors"))
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert told() == len(files) * "1"
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:-1])
    assert told() == "0x" + (len(files) - 2) * "1"
    assert told(random_init=None) == told(load="rank0") == ""
    monkeypatch.setenv("RANK", "0")
    assert f"2 of the {len(files)} files" in refusal(model, corpus, tmp_path, load="rank0")
    assert told() == "0x" + (len(files) - 2) * "1"
    index = model / "model.safetensors.index.json"
    index.write_text("{}")
    assert "index.json is broken (KeyError('weight_map'))" in refusal(model, corpus, tmp_path)
    index.unlink()
    assert told() == "-"
    monkeypatch.setattr(weights.constants, "HF_HUB_OFFLINE", False)
    assert told() == "-"
    monkeypatch.setattr(weights, "is_local", lambda name: False)
    assert told() == "?"


def test_what_transformers_converts_must_lie_on_the_node_of_rank_0(
    corpus, tmp_path, monkeypatch
):
    model = build_tiny_model(tmp_path / "mixtral", "mixtral", file_bytes="50KB")
    first = min(model.glob("model-*.safetensors"))
    first.unlink()
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert f"missing or cut short, the first {first.name}" in refusal(model, corpus, tmp_path)
    monkeypatch.setenv("RANK", "1")
    check(model, corpus, tmp_path)


def test_a_disk_too_small_for_the_checkpoints_is_told_with_what_they_need(
    tiny, corpus, tmp_path, monkeypatch
):
    parameters = sum(p.numel() for p in train_llm.AutoModelForCausalLM.from_pretrained(
        tiny).parameters())
    one = 12 * parameters
    usage = shutil.disk_usage(tmp_path)
    needed = 3 * one + 4 * parameters  # two are kept, one is written; the export

    def with_free(free: int) -> None:
        monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: usage._replace(free=free))

    with_free(needed)
    check(tiny, corpus, tmp_path)
    with_free(needed - 1)
    assert "make room, or choose another --save-dir" in refusal(tiny, corpus, tmp_path)
    check(tiny, corpus, tmp_path, ckpt_freq=0)
    old = tmp_path / "outputs/new/checkpoints/step-00000001/__0_0.distcp"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"1")  # will be removed in time
    check(tiny, corpus, tmp_path)
    old.unlink()
    monkeypatch.setenv("WORLD_SIZE", "2")  # half of each checkpoint lies on the other node
    check(tiny, corpus, tmp_path)
