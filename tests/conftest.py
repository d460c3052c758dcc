"""What the tests share: tiny models and data made on the spot, ways to start the real script."""

import contextlib
import functools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may depend on a network
os.environ["TOKENIZERS_PARALLELISM"] = "false"
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's children ignore it

WORDS = "the a cat dog sees hears river stone under over and not sleeps runs green old".split()


LONGEST = ("test_launch_hosts", "test_state", "test_train", "test_offload", "test_rows")


def pytest_configure(config: pytest.Config) -> None:
    """On a machine with GPUs, too, they are for the tests that ask for them."""
    if "not gpu" in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that of several processes none ends alone with one."""
    items.sort(key=lambda item: (*LONGEST, item.path.stem).index(item.path.stem))


def build_tokenizer(folder: Path) -> int:
    """A byte-level BPE tokenizer that begins each text with BOS, as Llama's does; its length."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<bos>", "<eos>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>"
    )
    fast.save_pretrained(folder)
    return len(fast)


def build_tiny_model(folder: Path, kind: str = "llama", *, dtype="float32", file_bytes="1GB",
                     **changes) -> Path:
    """A two-layer model of the named architecture, with its tokenizer, saved in `folder`."""
    import torch
    import transformers

    vocabulary = build_tokenizer(folder)
    shape = dict(
        vocab_size=vocabulary, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=12, max_position_embeddings=128,
        initializer_range=0.1, bos_token_id=0, eos_token_id=1, pad_token_id=None,
    )
    name = {"llama": "Llama", "qwen3": "Qwen3", "gemma": "Gemma", "gemma2": "Gemma2",
            "mistral": "Mistral", "deepseek": "DeepseekV3", "mixtral": "Mixtral",
            "gpt-oss": "GptOss", "gemma4": "Gemma4Text", "mamba": "Mamba",
            "falcon-h1": "FalconH1", "llama4": "Llama4Text", "opt": "OPT"}[kind]
    extra = {"gpt-oss": dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=9),
             "llama4": dict(num_local_experts=2, intermediate_size_mlp=96, attention_chunk_size=9),
             "opt": dict(ffn_dim=96, word_embed_proj_dim=48),
             "falcon-h1": dict(mamba_d_ssm=96, mamba_n_heads=4, mamba_d_head=24, mamba_d_state=8),
             "gemma4": dict(vocab_size_per_layer_input=vocabulary, global_head_dim=24,
                            hidden_size_per_layer_input=8, sliding_window=9,
                            layer_types=["sliding_attention", "full_attention"]),
             "gemma": {"tie_word_embeddings": True}, "mistral": {"sliding_window": 9},
             "gemma2": {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0}}
    config = getattr(transformers, f"{name}Config")(**shape | extra.get(kind, {}) | changes)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=file_bytes)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A tiny untied Llama in float32."""
    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "llama")


def write_corpus(path: Path) -> Path:
    """200 documents of very different lengths: some fill several rows, many share one."""
    rng = random.Random(0)
    with path.open("w") as file:
        for i in range(200):
            lengths = [1, 2, 3] if i // 20 % 2 else [9, 40, 90]
            text = " ".join(rng.choice(WORDS) for _ in range(rng.choice(lengths)))
            file.write(json.dumps({"text": text}) + "\n")
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl")


@pytest.fixture(scope="session")
def rows_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("rows")


def run(command: list, *, timeout: float = 120, **env) -> subprocess.CompletedProcess:
    """Run a command from the project's folder; text output, no exception but TimeoutExpired.

    It gets SIGTERM when its time is over, or this process dies: torchrun then ends its ranks, which
    SIGKILL would leave at work, and on a GPU.
    """
    words = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []
    words += map(str, command)
    with subprocess.Popen(words, cwd=ROOT, env=environment(**env), text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                out, err = process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                out, err = process.communicate()
            raise subprocess.TimeoutExpired(words, timeout, out, err) from None
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def environment(**env) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"} | env


claimed: list[socket.socket] = []  # the last port of the hundred that this process uses


def free_port() -> int:
    """A port to begin with: jobs in one start use up to ninety behind it, too.

    So not one that the system gives away (32768 and up), each of several test workers draws from a
    range of its own, and what was drawn stays this process's until it draws again.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = random.SystemRandom().randrange(50) * 100 + 10_000 + 5_000 * worker
        claim = socket.socket()
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            claim.bind(("127.0.0.1", port + 99))
            claimed[:] = [claim]
            return port


def torchrun(
    ranks: int, script: str, *options, timeout: float = 300, restarts: int = 0, **env
) -> subprocess.CompletedProcess:
    """A script of the project under torchrun, on one node."""
    return run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", ranks,
         "--master-addr", "127.0.0.1", "--master-port", free_port(), "--max-restarts", restarts,
         script, *options],
        timeout=timeout, **env,
    )


@functools.cache
def forked() -> subprocess.Popen:
    """tests/forked.py, which ends with this process."""
    return subprocess.Popen(
        [sys.executable, "tests/forked.py"], cwd=ROOT, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, env=environment())


def run_on_ranks(
    ranks: int, script: str, *words, timeout: int = 300, **env
) -> subprocess.CompletedProcess:
    """A script on `ranks` processes of this node: by torchrun or, quicker, by tests/forked.py."""
    import torch

    if torch.cuda.is_available():
        return torchrun(ranks, script, *words, timeout=timeout, **env)
    command = [str(word) for word in (script, *words)]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        print(json.dumps({
            "ranks": ranks, "port": free_port(), "words": command, "out": str(out), "err": str(err),
            "env": environment(**env), "timeout": timeout}), file=forked().stdin, flush=True)
        status = int(forked().stdout.readline())
        done = subprocess.CompletedProcess(command, status, out.read_text(), err.read_text())
    if status == -signal.SIGKILL:
        raise subprocess.TimeoutExpired(command, timeout, done.stdout, done.stderr)
    return done


def on_ranks(ranks: int, jobs: list[dict], folder: Path, *, timeout: int = 300) -> None:
    """Run the jobs of tests/on_ranks.py, all in one start of `ranks` processes."""
    file = folder / f"jobs-{ranks}.json"
    file.write_text(json.dumps(jobs))
    done = run_on_ranks(ranks, "tests/on_ranks.py", file, timeout=timeout)
    assert done.returncode == 0, done.stderr[-30000:]


def options_of(**options) -> list[str]:
    """Command-line words: max_steps=3, document_mask=False, allow_changes=None (a bare flag)."""
    words = []
    for name, value in options.items():
        option = name.replace("_", "-")
        if value is None:
            words.append(f"--{option}")
        elif isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", str(value)]
    return words


def main_in_process(**options) -> None:
    """The script's `main` on one rank, in this process: an import costs more than a tiny run."""
    import train_llm

    try:
        train_llm.main(options_of(**options))
    finally:
        if train_llm.dist.is_initialized():
            train_llm.dist.destroy_process_group()


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
