"""Dequantizes a GGUF to the target model's folder: float32 weights, tokenizer, configuration; a program of its own.

A child process gives back the memory at once and keeps the libraries' own progress bars off the terminal.

Usage: python -m fleet_cli.models.dequantize SOURCE FOLDER
"""

import copy
import sys
from pathlib import Path

from fleet_cli.models.lifeline import exit_with_parent


def dequantize(source: Path, folder: Path) -> None:
    """Write the model in `source` to `folder` as transformers loads it.

    Raises:
        SystemExit: With a sentence, if the libraries are missing or the vocabulary has no tokenizer.
    """
    try:
        import gguf  # noqa: F401 - transformers reads GGUF files with it
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        sys.exit(f"Making the target needs {error.name}; install it with: pip install 'dssd-fleet[edge]'")
    where = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    if len(tokenizer) != loaded.config.vocab_size:
        sys.exit(f"The tokenizer in {source} has {len(tokenizer)} tokens, its model {loaded.config.vocab_size}.")
    # A model loaded from a GGUF declines to be saved; the same weights in a plain model do not. Tied
    # embeddings stay tied and are written once.
    config = copy.deepcopy(loaded.config)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(arguments: list[str]) -> None:
    exit_with_parent()
    source, folder = arguments
    dequantize(Path(source), Path(folder))


if __name__ == "__main__":
    main(sys.argv[1:])
