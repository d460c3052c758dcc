"""Which kinds of causal language model the installed transformers knows, and train_llm.py takes.

    python tests/try_models.py [KIND ...]

Each kind's own default config, two layers deep where it lets itself be told, is built on the meta
device by the script itself: with the document mask, else without. Nothing is trained; that is for
the tests, with some. Kinds whose default config transformers itself cannot build are told apart.
"""

import argparse
import logging
import sys
import tempfile
import traceback
from collections import defaultdict
from pathlib import Path

import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conftest import ROOT, build_tokenizer, options_of

import layers
import train_llm


def default_config(kind: str) -> transformers.PretrainedConfig:
    try:
        return AutoConfig.for_model(kind, num_hidden_layers=2)
    except Exception:  # deeper, then: lists by layer must fit the number of layers
        return AutoConfig.for_model(kind)


def try_kind(kind: str, folder: Path) -> tuple[str, str]:
    """(what becomes of it, why)."""
    words = dict(experiment_name="x", model_name=folder, dataset_name="x", seq_length=64,
                 random_init=True)
    try:
        default_config(kind).save_pretrained(folder)
        for how, masked in ("taken", True), ("taken with --no-document-mask", False):
            try:
                args = train_llm.parse_args(options_of(**words, document_mask=masked))
                model = train_llm.build_model(args)
                whole = AutoConfig.for_model(kind)  # layers that differ, which two may not
                for config in (model.config, whole):
                    layers.flops_per_token(config.get_text_config(), 1, 64)
                return how, ""
            except train_llm.InputError as error:
                why = str(error).replace(str(folder), "it")
        return "refused", why
    except Exception as error:
        ours = Path(traceback.extract_tb(error.__traceback__)[-1].filename).is_relative_to(ROOT)
        how = "FAILED" if ours else "not built by transformers itself"
        return how, f"{type(error).__name__}: {error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("kinds", nargs="*", help="those to try; all, if none is named")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    known = sorted({config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING})
    found = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        build_tokenizer(Path(folder))
        for kind in args.kinds or known:
            how, why = try_kind(kind, Path(folder))
            found[how].append((kind, why))
    print(f"transformers {transformers.__version__}")
    for how, kinds in found.items():
        print(f"{how}: {len(kinds)}")
        for kind, why in kinds:
            print(f"    {kind}{why and ': '}{' '.join(why.split())[:160]}")


if __name__ == "__main__":
    main()
