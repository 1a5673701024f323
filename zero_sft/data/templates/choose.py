"""Which template, and a sample as text by it."""

from pathlib import Path
from typing import Any

from zero_sft.data.samples.conversation import Conversation, PromptCompletion, Sample
from zero_sft.data.sources.text_io import read_text
from zero_sft.data.templates.jinja import NAMED, ChatTemplate
from zero_sft.data.templates.probe import probe_template
from zero_sft.data.templates.rendered import RenderedText
from zero_sft.data.templates.vicuna import VICUNA, VicunaTemplate, vicuna_stop
from zero_sft.errors import DataError

MODEL = "model"

Template = VicunaTemplate | ChatTemplate


def render(sample: Sample, template: Template, tokenizer: Any) -> RenderedText:
    """A conversation by the template; a passage as it is, with the token that ends it where it does not end so already.

    Raises:
        DataError: the template can't render the conversation, or its answers can't be told surely.
    """
    if isinstance(sample, Conversation):
        return template.render(sample)
    return _passage(sample, tokenizer)


def _passage(sample: PromptCompletion, tokenizer: Any) -> RenderedText:
    text, end, begin = sample.prompt + sample.completion, tokenizer.eos_token, tokenizer.bos_token
    if end and not text.endswith(end) and not text.rstrip().endswith(end):
        text += end
    stop = len(text)
    if end and not text.endswith(end):  # white space follows it, which the model never writes
        stop = len(text.rstrip())
    spans = ((len(sample.prompt), stop),) if sample.completion and stop > len(sample.prompt) else ()
    has_begin = bool(begin) and text.startswith(begin)
    return RenderedText(text=text, spans=spans, where=sample.where, adds_special_tokens=not has_begin)


def choose_template(name: str | None, tokenizer: Any) -> Template:
    """The template of that name, or the Jinja of that file; for None the tokenizer's own if it has one, else Vicuna's.

    Raises:
        DataError: no such template, one that can't be used, or a tokenizer that has none, or no token to end an answer with.
    """
    own: Any = getattr(tokenizer, "chat_template", None)
    if name == VICUNA or (name is None and not own):
        return VicunaTemplate(stop=vicuna_stop(tokenizer))
    source = None
    if name in NAMED:
        source, stop = NAMED[name]
        if stop not in tokenizer.get_added_vocab():
            raise DataError(
                f"--chat_template {name}: this model's tokenizer has no token {stop}, which ends a turn there. "
                "Use --chat_template vicuna, or add the token.",
                code="data.template_token_missing",
            )
    elif name not in (None, MODEL):
        source = _from_file(Path(name).expanduser())
    elif not own:
        raise DataError(
            "--chat_template model: this model's tokenizer has no chat template. Use --chat_template vicuna.",
            code="data.model_without_template",
        )
    try:
        habits = probe_template(tokenizer, source)
    except DataError as error:
        raise DataError(f"--chat_template {name or MODEL}: {error}", code=error.code) from error
    return ChatTemplate(tokenizer=tokenizer, name=name or MODEL, habits=habits, source=source)


def _from_file(path: Path) -> str:
    if path.is_dir():
        found = next(iter(sorted(path.glob("*.jinja"))), None)
        remedy = f"give {found}" if found else "name the Jinja file itself"
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
