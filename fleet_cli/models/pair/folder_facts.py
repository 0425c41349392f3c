"""Facts of a folder in the layout of transformers: its configuration, its tokenizer, and the headers of its weights."""

import json
from pathlib import Path
from typing import Any, Final

from fleet_cli.models.pair.facts import Form, LayerShape, ModelFacts
from fleet_cli.models.pair.gguf_header import ModelUnreadable
from fleet_cli.models.pair.safetensors_header import read_weights
from fleet_edge.verifiers.contract import UnsupportedModel, VerifierError
from schemas.vocabulary import Vocabulary

__all__ = ["folder_facts"]

_SERVED: Final = frozenset({"full_attention", "sliding_attention"})
_GENERATION: Final = "generation_config.json"
_TOKENIZER: Final = "tokenizer_config.json"
_TEMPLATE: Final = "chat_template.jinja"


def folder_facts(folder: Path) -> ModelFacts:
    """Read a folder.

    Raises:
        ModelUnreadable: It does not hold a whole model.
    """
    weights = read_weights(folder) if (folder / "config.json").is_file() else None
    # Both take seconds to import.
    from fleet_edge.verifiers.packed.architecture import context_of
    from fleet_edge.verifiers.packed.target import end_tokens, target_tokens, text_config

    try:
        tokens = target_tokens(folder)
        config = text_config(str(folder))
        context, refusal = context_of(config), _refusal(config)
    except (UnsupportedModel, VerifierError) as error:
        raise ModelUnreadable(str(error)) from error
    assert weights is not None, "target_tokens has found a configuration"
    generation = _Generation(_json(folder / _GENERATION).get("eos_token_id"))
    ends = tuple(token for token in end_tokens(generation, config) if 0 <= token < len(tokens))
    tokenizer = _json(folder / _TOKENIZER)
    return ModelFacts(
        source=str(folder),
        form=Form.FOLDER,
        architecture=str(config.model_type),
        number_format=weights.number_format,
        vocabulary=Vocabulary.of(tokens),
        end_tokens=ends,
        end_texts=tuple(tokens[token] for token in ends),
        chat_template=_template(folder, tokenizer),
        bos=_special(tokenizer, "bos_token"),
        eos=_special(tokenizer, "eos_token"),
        context=context,
        parameters=weights.parameters,
        weight_bytes=weights.bytes,
        layers=_layers(config, folder),
        refusal=refusal,
    )


class _Generation:
    """What is needed of a generation configuration."""

    def __init__(self, eos_token_id: object) -> None:
        self.eos_token_id = eos_token_id


def _refusal(config: Any) -> str:  # noqa: ANN401 - transformers has no type information
    if getattr(config, "is_encoder_decoder", False):
        return "has an encoder of its own"
    foreign = sorted({str(kind) for kind in getattr(config, "layer_types", None) or ()} - _SERVED)
    return f"has layers of kind {', '.join(foreign)}, which take no tokens back" if foreign else ""


def _layers(config: Any, folder: Path) -> tuple[LayerShape, ...]:  # noqa: ANN401
    """Return what each layer keeps of a token."""
    try:
        heads = int(config.num_attention_heads)
        kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        count = int(config.num_hidden_layers)
    except (AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelUnreadable(f"The config.json of {folder} does not say which layers it has.") from error
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * count
    return tuple(
        LayerShape(kv_heads, dim, dim, window if kind == "sliding_attention" else None) for kind in kinds[:count]
    )


def _template(folder: Path, tokenizer: dict[str, Any]) -> str | None:
    """Return the chat template: a file of its own, or a field of the tokenizer's configuration."""
    try:
        return (folder / _TEMPLATE).read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError) as error:
        raise ModelUnreadable(f"The file {folder / _TEMPLATE} cannot be read; fetch the model again.") from error
    found = tokenizer.get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _special(tokenizer: dict[str, Any], name: str) -> str:
    found = tokenizer.get(name)
    if isinstance(found, dict):
        found = found.get("content")
    return found if isinstance(found, str) else ""


def _json(path: Path) -> dict[str, Any]:
    """Return a file's content; nothing of a file that is not there."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelUnreadable(f"The file {path} is damaged; fetch the model again.") from error
    if not isinstance(found, dict):
        raise ModelUnreadable(f"The file {path} is damaged; fetch the model again.")
    return found
