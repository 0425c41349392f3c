"""Deepens a model: the same function with several times the layers, so that a small model costs what a large one does.

Behind each block stand blocks whose output projections are zero. They read their weights, attend and multiply like any
other, and add nothing: logits stay what they were, while a step costs as many times more as there are blocks. So draft
and target stand in a realistic ratio on any machine, without a large model to download. The text is that of the small
model; the cost is real. A program of its own.

Usage: python -m fleet_cli.models.deepen SOURCE OUTPUT TIMES
"""

import json
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from fleet_cli.models.lifeline import exit_with_parent

_FOLDER_LAYER: Final = re.compile(r"^(model\.layers\.)(\d+)(\..+)$")
_FOLDER_OUTPUTS: Final = ("self_attn.o_proj.", "mlp.down_proj.")
_GGUF_LAYER: Final = re.compile(r"^(blk\.)(\d+)(\..+)$")
_GGUF_OUTPUTS: Final = ("attn_output.", "ffn_down.")
_INDEX: Final = "model.safetensors.index.json"


def deepen_folder(source: Path, folder: Path, times: int) -> None:
    """Write a transformers model with `times` as many layers, one file of weights for each further layer of all.

    Args:
        source: Folder with `config.json` and safetensors.
        folder: To make.
        times: How many layers there are to be for each one, 2 or more.

    Raises:
        SystemExit: With a sentence, if the model is built in a way that is not known here.
    """
    try:
        from safetensors import safe_open
        from safetensors.torch import save_file
    except ImportError as error:
        sys.exit(f"Deepening the target needs {error.name}; install it with: pip install 'dssd-fleet[edge]'")
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
    """Write a GGUF with `times` as many layers.

    Args:
        source: The model, quantized or not.
        output: To make.
        times: How many layers there are to be for each one, 2 or more.

    Raises:
        SystemExit: With a sentence, if the model is built in a way that is not known here.
    """
    try:
        import gguf
    except ImportError:
        sys.exit("Deepening a GGUF needs gguf; install it with: pip install 'dssd-fleet[edge]'")
    reader = gguf.GGUFReader(source)
    architecture = reader.fields[gguf.Keys.General.ARCHITECTURE].contents()
    count_key = gguf.Keys.LLM.BLOCK_COUNT.format(arch=architecture)
    layers = reader.fields[count_key].contents()
    _require_outputs(source, {tensor.name for tensor in reader.tensors}, _GGUF_LAYER, _GGUF_OUTPUTS)
    writer = gguf.GGUFWriter(output, architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == gguf.Keys.General.ARCHITECTURE:
            continue  # the writer writes these by itself
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
    """Return what a weight is called in the `part`-th of the layers made of one; None if it is not there again."""
    match = layer.match(name)
    if match is None:
        return name if part == 0 else None
    return f"{match[1]}{int(match[2]) * times + part}{match[3]}"


def _is_output(layer: re.Pattern[str], name: str, outputs: tuple[str, ...]) -> bool:
    match = layer.match(name)
    return match is not None and match[3].removeprefix(".").startswith(outputs)


def _require_outputs(source: Path, names: Iterable[str], layer: re.Pattern[str], outputs: tuple[str, ...]) -> None:
    """Exit unless each layer has both of its output projections: without, the layers added would not be silent."""
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


def main(arguments: list[str]) -> None:
    exit_with_parent()
    source, output = map(Path, arguments[:2])
    (deepen_folder if source.is_dir() else deepen_gguf)(source, output, int(arguments[2]))


if __name__ == "__main__":
    main(sys.argv[1:])
