"""Small tokenizers made on the spot, and what a sample trains on, as text."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from zero_sft.data.dataset import PreparedDataset, prepare_source
from zero_sft.data.mixture import DatasetSpec
from zero_sft.data.pipeline import Pipeline
from zero_sft.data.samples.conversation import Conversation, Turn
from zero_sft.data.sources.local_files import LocalFiles
from zero_sft.data.templates.choose import choose_template
from zero_sft.data.tokenize import IGNORE_INDEX, TokenizedSample

FOLDER = tempfile.TemporaryDirectory(prefix="zero_sft_")
"""Holds the caches of `prepare`; removed when the process ends."""

SPECIAL = ("<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|eot|>")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(chat_template: str | None = None, **special: str) -> PreTrainedTokenizerBase:
    """Every byte is a token, so that what is trained on reads back exactly; adds <s> in front, as Llama's does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return _wrapped(backend, chat_template, special)


def word_tokenizer(words: Sequence[str], chat_template: str | None = None, **special: str) -> PreTrainedTokenizerBase:
    """Whole words with the space before them, as SentencePiece has: "▁Hello" is one token."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *words])}
    backend = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    return _wrapped(backend, chat_template, special)


def _wrapped(backend: Tokenizer, chat_template: str | None, special: dict[str, str]) -> PreTrainedTokenizerBase:
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>", **special}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
    tokenizer.chat_template = chat_template
    return tokenizer


def make_pipeline(tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None, **options: Any) -> Pipeline:
    """A spec's pipeline, with the template of that name."""
    spec = DatasetSpec(sources=(), root=Path(FOLDER.name), **options)
    return spec.pipeline(tokenizer, choose_template(chat_template, tokenizer))


def prepare(path: Path, tokenizer: PreTrainedTokenizerBase, **options: Any) -> PreparedDataset:
    """A file or folder as a dataset, with a cache that nobody else uses."""
    root = Path(tempfile.mkdtemp(dir=FOLDER.name))
    return prepare_source(LocalFiles(path=Path(path)), make_pipeline(tokenizer, **options), root)


def conversation(*texts: str, system: str | None = None) -> Conversation:
    """User and assistant in turn."""
    turns = [Turn(role=("user", "assistant")[number % 2], text=text) for number, text in enumerate(texts)]
    first = [] if system is None else [Turn(role="system", text=system)]
    return Conversation(turns=(*first, *turns), where="here")


def trained_text(example: TokenizedSample, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The runs of tokens that are trained on, decoded."""
    runs: list[list[int]] = []
    previous = IGNORE_INDEX
    for token, label in zip(example.input_ids, example.labels, strict=True):
        assert label in (token, IGNORE_INDEX)
        if label != IGNORE_INDEX:
            if previous == IGNORE_INDEX:
                runs.append([])
            runs[-1].append(token)
        previous = label
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]
