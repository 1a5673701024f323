"""Choose a chat template, and render samples with it."""

from pathlib import Path
from typing import Any

from zero_sft.data.samples.conversation import Conversation, PromptCompletion
from zero_sft.data.sources.text_io import read_text
from zero_sft.data.templates.jinja import ChatTemplate
from zero_sft.data.templates.named import NAMED
from zero_sft.data.templates.probe import probe_template
from zero_sft.data.templates.rendered import RenderedText
from zero_sft.data.templates.vicuna import VICUNA, VicunaTemplate, vicuna_turn_end
from zero_sft.errors import DataError

MODEL = "model"

Template = VicunaTemplate | ChatTemplate


def render(sample: Conversation | PromptCompletion, template: Template, tokenizer: Any) -> RenderedText:
    """Render a conversation with the template; plain text stays as it is, with an end-of-sequence token if it lacks one.

    Raises:
        DataError: the template can't render the conversation, or its answers can't be located reliably.
    """
    if isinstance(sample, Conversation):
        return template.render(sample)
    text, eos, bos = sample.prompt + sample.completion, tokenizer.eos_token, tokenizer.bos_token
    if eos and not text.endswith(eos) and not text.rstrip().endswith(eos):
        text += eos
    stop = len(text)
    if eos and not text.endswith(eos):  # white space follows the token, and the model never writes it
        stop = len(text.rstrip())
    spans = ((len(sample.prompt), stop),) if sample.completion and stop > len(sample.prompt) else ()
    starts_with_bos = bool(bos) and text.startswith(bos)
    weights = () if sample.weight == 1 else (sample.weight,) * len(spans)
    return RenderedText(text=text, spans=spans, weights=weights, adds_special_tokens=not starts_with_bos)


def choose_template(name: str | None, tokenizer: Any) -> Template:
    """Choose the template by name or by the path of a Jinja file; for None the tokenizer's, or Vicuna's if it has none.

    Raises:
        DataError: no such template, an unusable one, or a tokenizer without a template or without a token to end an answer.
    """
    tokenizer_template: Any = getattr(tokenizer, "chat_template", None)
    if name == VICUNA or (name is None and not tokenizer_template):
        return VicunaTemplate(turn_end=vicuna_turn_end(tokenizer))
    source = None
    if name in NAMED:
        source, stop = NAMED[name]
        if stop not in tokenizer.get_added_vocab():
            raise DataError(
                f"--chat_template {name}: this model's tokenizer has no token {stop}, which ends a turn in this template. "
                "Use --chat_template vicuna, or add the token.",
                code="data.template_token_missing",
            )
    elif name not in (None, MODEL):
        source = _from_file(Path(name).expanduser())
    elif not tokenizer_template:
        raise DataError(
            "--chat_template model: this model's tokenizer has no chat template. Use --chat_template vicuna.",
            code="data.model_without_template",
        )
    try:
        traits = probe_template(tokenizer, source)
    except DataError as error:
        raise DataError(f"--chat_template {name or MODEL}: {error}", code=error.code) from error
    return ChatTemplate(tokenizer=tokenizer, name=name or MODEL, traits=traits, source=source)


def _from_file(path: Path) -> str:
    if path.is_dir():
        example = next(iter(sorted(path.glob("*.jinja"))), None)
        remedy = f"give {example}" if example else "name the Jinja file itself"
        raise DataError(
            f"--chat_template {path} is a folder; expected a Jinja file: {remedy}.", code="data.template_is_a_folder"
        )
    if not path.is_file():
        if path.suffix or len(path.parts) > 1:
            raise DataError(f"--chat_template {path}: no such file.", code="data.no_such_template")
        names = ", ".join((VICUNA, *NAMED, MODEL))
        raise DataError(
            f"--chat_template {path}: unknown chat template; expected {names}, or the path of a Jinja file.",
            code="data.unknown_template",
        )
    return read_text(path, expected="a chat template in Jinja", argument="--chat_template")
