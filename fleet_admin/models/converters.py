"""Converters of models, each run by `prepare` as a separate program.

    python -m fleet_admin.models.converters quantize SOURCE OUTPUT QUANTIZATION
    python -m fleet_admin.models.converters dequantize SOURCE FOLDER
    python -m fleet_admin.models.converters deepen SOURCE OUTPUT TIMES

A child process returns its memory at once, and keeps what llama.cpp and transformers print off the terminal.

Deepening adds blocks whose output projections are zero behind each block. They compute like any other block and add
nothing: the logits stay the same, and a step costs as many times more as there are blocks. Draft and target then have a
realistic cost ratio on any machine, without a large model to download.
"""

import copy
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from fleet_common.extras import install_command


def exit_with_parent() -> None:
    """End this process when its standard input ends."""
    threading.Thread(target=_wait, daemon=True).start()


def _wait() -> None:
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


def quantize(source: str, output: str, quantization: str) -> None:
    """Quantize to a type as llama.cpp names it, such as Q4_0."""
    try:
        import llama_cpp
    except ImportError:
        sys.exit(f"Quantizing needs llama-cpp-python; install it with: {install_command('device')}")
    kind = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quantization}", None)
    if kind is None:
        sys.exit(f"This llama.cpp knows no quantization {quantization}.")
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = kind
    parameters.nthread = os.cpu_count() or 1
    # The source is quantized already; a draft may lose a little more.
    parameters.allow_requantize = True
    if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(output), parameters) != 0:
        sys.exit(f"llama.cpp could not make {quantization} of {source}.")


def dequantize(source: Path, folder: Path) -> None:
    """Write the model in `source` to `folder` as transformers loads it."""
    try:
        import gguf  # noqa: F401 - transformers reads GGUF files with it
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        sys.exit(f"Making the target needs {error.name}; install it with: {install_command('edge-torch')}")
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


_FOLDER_LAYER: Final = re.compile(r"^(model\.layers\.)(\d+)(\..+)$")
_FOLDER_OUTPUTS: Final = ("self_attn.o_proj.", "mlp.down_proj.")
_GGUF_LAYER: Final = re.compile(r"^(blk\.)(\d+)(\..+)$")
_GGUF_OUTPUTS: Final = ("attn_output.", "ffn_down.")
_INDEX: Final = "model.safetensors.index.json"


def deepen_folder(source: Path, folder: Path, times: int) -> None:
    """Write a transformers model with `times` as many layers, in `times` files of weights."""
    try:
        from safetensors import safe_open
        from safetensors.torch import save_file
    except ImportError as error:
        sys.exit(f"Deepening the target needs {error.name}; install it with: {install_command('edge-torch')}")
    import torch

    folder.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors" and file.name not in {"config.json", _INDEX}:
            shutil.copyfile(file, folder / file.name)
    _write_json(folder / "config.json", _deepened_config(json.loads((source / "config.json").read_text()), times))
    weights: dict[str, Any] = {}
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            weights |= {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - it is no mapping
    _require_outputs(source, weights, _FOLDER_LAYER, _FOLDER_OUTPUTS)
    where: dict[str, str] = {}
    size = 0
    for part in range(times):
        shard = f"model-{part + 1:05d}-of-{times:05d}.safetensors"
        tensors = {}
        for name, weight in weights.items():
            if (new := _place(_FOLDER_LAYER, name, times, part)) is not None:
                zero = part > 0 and _is_output(_FOLDER_LAYER, name, _FOLDER_OUTPUTS)
                tensors[new] = torch.zeros_like(weight) if zero else weight
                size += weight.nbytes
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, shard)
    _write_json(folder / _INDEX, {"metadata": {"total_size": size}, "weight_map": where})


def deepen_gguf(source: Path, output: Path, times: int) -> None:
    """Write a GGUF, quantized or not, with `times` as many layers."""
    try:
        import gguf
    except ImportError:
        sys.exit(f"Deepening a GGUF needs gguf; install it with: {install_command('edge')}")
    reader = gguf.GGUFReader(source)
    architecture = reader.fields[gguf.Keys.General.ARCHITECTURE].contents()
    count_key = gguf.Keys.LLM.BLOCK_COUNT.format(arch=architecture)
    layers = reader.fields[count_key].contents()
    _require_outputs(source, {tensor.name for tensor in reader.tensors}, _GGUF_LAYER, _GGUF_OUTPUTS)
    writer = gguf.GGUFWriter(output, architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == gguf.Keys.General.ARCHITECTURE:
            continue  # the writer adds these
        value, kind = field.contents(), field.types[0]
        if field.name == count_key:
            value = layers * times
        elif kind == gguf.GGUFValueType.ARRAY and field.name.startswith(f"{architecture}.") and len(value) == layers:
            value = [each for each in value for _ in range(times)]  # one for each layer
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, value, kind, sub_type=inner)
    planned = list(_gguf_tensors(reader.tensors, times))
    for name, tensor, _ in planned:
        data = tensor.data
        writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, tensor, zero in planned:
        # Zero bytes are zeros in every format of llama.cpp: a block of weights is nothing without its scale.
        writer.write_tensor_data(tensor.data * 0 if zero else tensor.data)
    writer.close()


def _gguf_tensors(tensors: Iterable[Any], times: int) -> Iterator[tuple[str, Any, bool]]:
    for tensor in tensors:
        for part in range(times):
            if (new := _place(_GGUF_LAYER, tensor.name, times, part)) is not None:
                yield new, tensor, part > 0 and _is_output(_GGUF_LAYER, tensor.name, _GGUF_OUTPUTS)


def _place(layer: re.Pattern[str], name: str, times: int, part: int) -> str | None:
    """Return a weight's name in the `part`-th copy of its layer; None for a weight that is not copied."""
    match = layer.match(name)
    if match is None:
        return name if part == 0 else None
    return f"{match[1]}{int(match[2]) * times + part}{match[3]}"


def _is_output(layer: re.Pattern[str], name: str, outputs: tuple[str, ...]) -> bool:
    match = layer.match(name)
    return match is not None and match[3].removeprefix(".").startswith(outputs)


def _require_outputs(source: Path, names: Iterable[str], layer: re.Pattern[str], outputs: tuple[str, ...]) -> None:
    """Exit unless each layer has both output projections, without which a copy would change the output."""
    parts = [match for name in names if (match := layer.match(name))]
    layers = {match[2] for match in parts}
    with_both = set.intersection(
        *({match[2] for match in parts if match[3].removeprefix(".").startswith(output)} for output in outputs)
    )
    if not layers or with_both != layers:
        sys.exit(
            f"{source} has layers whose output projections are not {' and '.join(outputs)}: it cannot be deepened."
        )


def _deepened_config(config: dict[str, Any], times: int) -> dict[str, Any]:
    layers = config["num_hidden_layers"]
    config["num_hidden_layers"] = layers * times
    if isinstance(config.get("layer_types"), list):
        config["layer_types"] = [kind for kind in config["layer_types"] for _ in range(times)]
    return config


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def main(what: str, source: str, output: str, *more: str) -> None:
    # The parent holds the other end of standard input and never writes; the kernel closes it even after a kill.
    exit_with_parent()
    match what:
        case "quantize":
            quantize(source, output, more[0])
        case "dequantize":
            dequantize(Path(source), Path(output))
        case "deepen":
            deepen = deepen_folder if Path(source).is_dir() else deepen_gguf
            deepen(Path(source), Path(output), int(more[0]))


if __name__ == "__main__":
    main(*sys.argv[1:])
