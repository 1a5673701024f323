"""Tests of the tokenizer: the same ids as SentencePiece, pad tokens, and the broadcast from rank 0."""

import json
import os
import random
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.errors import raises
from tests.real_tokenizers import REAL, sentencepiece_folder, write_config
from zero_sft.cluster.control_group import all_gather_json
from zero_sft.cluster.world import World
from zero_sft.hub.options import HubOptions
from zero_sft.tokenizer import load_tokenizer
from zero_sft.tokenizer.fingerprint import PROBES, fingerprint
from zero_sft.tokenizer.serialize import deserialize, serialize, unpack
from zero_sft.tokenizer.setup import choose_pad_token, set_up

TEXTS = [
    *PROBES[2:],
    "Hello, world!",
    "two  spaces and   three\tand a tab",
    "for i in range(10):\n        print(i)  # eight before, two here\n\n\n\tend\n",
    "繁體字と漢字かなカナ、한국어 문장. 🤯👩‍👩‍👧‍👦",
    "नमस्ते दुनिया — مرحبا بالعالم — שלום — สวัสดี",
    "a\u00a0b\u200bc \u0301x Z͑ͫ̓ͪ 𝔘𝔫𝔦",
    "trailing   ",
    "\n\nline",
]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def byte_level(special):
    """Create a small byte-level BPE, whose special tokens come first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*TEXTS, *PROBES, "the then there these hello help held"], trainer)
    return tokenizer


def chatml_folder(folder, special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"), model_type="qwen3", **settings):
    """Create a chat model's tokenizer without an unk token, like Qwen's."""
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": TEMPLATE, **settings}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(list(special)), **settings)
    tokenizer.save_pretrained(write_config(folder, model_type=model_type, vocab_size=400))
    return folder


def opt_folder(folder):
    """Create OPT's tokenizer: a GPT-2 tokenizer in two files, whose unk, bos and eos are all `</s>`."""
    byte_level(["<s>", "<pad>", "</s>"]).model.save(str(write_config(folder, model_type="opt", vocab_size=400)))
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **special}))
    return folder


def word_level_folder(folder):
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "hello": 3, "world": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(write_config(folder, model_type="llama"))
    return folder


def ready(folder, **options):
    return set_up(folder, HubOptions(**options), 512, "right")


KINDS = {
    "vicuna": ("llama", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": True}),
    "llama": ("llama", {"tokenizer_class": "LlamaTokenizer"}),
    "mistral": ("mistral", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}),
    "bare": ("mistral", {}),
}


@pytest.mark.parametrize(("version", "kind"), [*(("v1", kind) for kind in KINDS), ("v3", "vicuna")])
def test_ids_are_those_of_sentencepiece(tmp_path, real_models, version, kind):
    import sentencepiece

    model_type, settings = KINDS[kind]
    tokenizer = ready(sentencepiece_folder(tmp_path, real_models / REAL[version], model_type, **settings))
    own = sentencepiece.SentencePieceProcessor(model_file=str(real_models / REAL[version]))
    assert len(tokenizer) == own.vocab_size()
    rng = random.Random(7)
    words = ["\n", "\t", *"日 한국 العربية हिन्दी def (x) # 👩‍👩 é Straße 1 23 ... the".split()]  # noqa: SIM905
    gaps = [0, 1, 1, 2, 3, 4, 7, 8, 17, 33]
    mixed = ["".join(rng.choice(words) + " " * rng.choice(gaps) for _ in range(12)) for _ in range(300)]
    for text in [*TEXTS, *mixed]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == own.encode(text), text
        assert tokenizer.encode(text) == [own.bos_id(), *ids]
        assert tokenizer.decode(ids) == own.decode(ids)


def test_a_conversion_to_other_ids_is_refused(tmp_path):
    """For a unigram model of a type without a tokenizer class, transformers leaves out the space before a text."""
    import sentencepiece

    with (tmp_path / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS * 20), model_writer=file, vocab_size=220, hard_vocab_limit=False, minloglevel=2
        )
    write_config(tmp_path, model_type="llama")
    with raises("tokenizer.other_ids_than_sentencepiece"):
        ready(tmp_path)
    write_config(tmp_path, model_type="t5")
    assert type(ready(tmp_path)).__name__ == "T5Tokenizer"


def test_the_one_known_difference_is_a_leading_space(tmp_path, real_models):
    """Llama's tokenizers put a space before a text unless it begins with one; SentencePiece always does."""
    import sentencepiece

    tokenizer = ready(sentencepiece_folder(tmp_path, real_models / REAL["v1"], tokenizer_class="LlamaTokenizer"))
    own = sentencepiece.SentencePieceProcessor(model_file=str(real_models / REAL["v1"]))
    for text in (" x", "  two", "    four\n"):
        assert tokenizer.encode(text, add_special_tokens=False) == own.encode(text[1:])
    assert tokenizer.encode("<s>", add_special_tokens=False) == [1], "a special token written out is that token"


def test_transformers_own_ids_still_differ(tmp_path, real_models):
    """If this fails, transformers has fixed its conversion, and `_order_merges_by_score` can be removed."""
    folder = sentencepiece_folder(tmp_path, real_models / REAL["v1"], tokenizer_class="LlamaTokenizer")
    text = "two  spaces"
    assert AutoTokenizer.from_pretrained(folder).tokenize(text) != ready(folder).tokenize(text) == ["▁two", "▁", "▁spaces"]


@pytest.mark.slow
@pytest.mark.world_size(1)
def test_legacy_survives(tmp_path, real_models):
    """`legacy` controls the space after a special token; transformers does not save it."""
    for legacy in (True, False):
        folder = sentencepiece_folder(tmp_path / str(legacy), real_models / REAL["v1"], tokenizer_class="LlamaTokenizer",
                                      legacy=legacy)  # fmt: skip
        tokenizer = load_tokenizer(str(folder), model_max_length=512)
        assert tokenizer.legacy is legacy
        assert tokenizer.tokenize("</s>Hello") == ["</s>", "▁Hello" if legacy else "Hello"]
        tokenizer.save_pretrained(tmp_path / "saved")
        saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
        assert [saved.encode(each) for each in TEXTS] == [tokenizer.encode(each) for each in TEXTS]


@pytest.mark.parametrize("package", ["sentencepiece", "google.protobuf"])
def test_missing_packages_are_named(tmp_path, real_models, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with raises("tokenizer.package_missing", package, "pip install sentencepiece protobuf"):
        ready(sentencepiece_folder(tmp_path, real_models / REAL["v1"]))


# ------------------------------------------------------------------------------------------------------------- pad tokens


def padding(special, rows=None, chat_template=None, **named):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(special), chat_template=chat_template, **named)
    size = len(tokenizer)
    tokenizer.pad_token, why = choose_pad_token(tokenizer, rows)
    assert len(tokenizer) == size, "the vocabulary never grows"
    return tokenizer.pad_token, why.split()[-1]


@pytest.mark.parametrize(
    ("special", "named", "pad"),
    [
        (["<unk>", "<s>", "</s>"], {"unk_token": "<unk>", "eos_token": "</s>"}, "<unk>"),
        (["</s>", "<pad>"], {"unk_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"}, "</s>"),  # OPT
        (["<end>", "<im_end>"], {"pad_token": "<end>", "eos_token": "<im_end>"}, "<end>"),  # Qwen2.5-Instruct
        (["<end>", "<image_pad>", "<fim_pad>"], {"pad_token": "<end>", "eos_token": "<end>"}, "<fim_pad>"),  # Qwen2.5
        (["<b>", "<e>", "<|reserved_special_token_0|>", "<|finetune_right_pad_id|>"], {"eos_token": "<e>"},
         "<|finetune_right_pad_id|>"),  # Llama 3.1
        (["<b>", "<e>", "<|reserved_special_token_0|>"], {"eos_token": "<e>"}, "<|reserved_special_token_0|>"),  # Llama 3
        (["<e>", "<x>"], {"eos_token": "<e>"}, "<e>"),
        (["<e>", "<keypad>"], {"eos_token": "<e>"}, "<e>"),
    ],
)  # fmt: skip
def test_pad_token(special, named, pad):
    assert padding(special, **named)[0] == pad


def test_a_pad_token_is_no_content():
    assert padding(["<e>", "<pad>"], eos_token="<e>", chat_template="{{ '<pad>' }}") == ("<e>", "one")
    assert padding(["<e>", "<unused0>"], eos_token="<e>", chat_template="{{ 'x' }}") == ("<unused0>", "token")


def test_a_pad_token_has_an_embedding():
    """Some fine-tuned models declare a pad token without a row in the embedding."""
    assert padding(["<e>", "<x>", "<pad>"], rows=2, pad_token="<pad>", eos_token="<e>")[0] == "<e>"
    with raises("tokenizer.nothing_to_pad_with"):
        padding(["<x>"])


def test_the_choice_is_logged_in_one_line(tmp_path, caplog):
    with caplog.at_level("INFO", logger="zero_sft"):
        ready(word_level_folder(tmp_path / "unk"))
        assert not caplog.records
        ready(chatml_folder(tmp_path / "chat"))
        assert not caplog.records, "its own pad token, or the unk token where it has none, is what everybody expects"
        ready(opt_folder(tmp_path / "opt"))
    (record,) = caplog.records
    assert record.levelname == "INFO"
    expected = "the tokenizer pads with </s> (the unk token) instead of <pad>; padding is never trained on"
    assert record.getMessage() == expected


# ------------------------------------------------------------------------------------------------------- the serialized form


def test_serialized_tokenizer_is_plain_bytes(tmp_path):
    serialized = serialize(ready(chatml_folder(tmp_path), token="hf_secret"), "a/b c")
    assert b"hf_secret" not in serialized
    index, files = unpack(serialized)
    assert (index["label"], index["class"][1]) == ("a_b_c", "TokenizersBackend")
    assert sorted(files) == ["tokenizer.json", "tokenizer_config.json"]
    assert json.loads(files["tokenizer.json"])["model"]["type"] == "BPE"
    with raises("tokenizer.bad_bytes"):
        unpack(serialized[:-1])


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", "a\\b", "..", "", "a\0b"])
def test_serialized_tokenizer_stays_in_its_folder(name):
    head = json.dumps({"label": "x", "class": ["a", "b"], "files": [[name, 0]]}).encode()
    with raises("tokenizer.bad_bytes"):
        deserialize(len(head).to_bytes(8, "big") + head, "x")


@pytest.mark.world_size(1)
def test_several_chat_templates_survive(tmp_path):
    templates = {"default": TEMPLATE, "tool_use": "tools"}
    tokenizer = load_tokenizer(str(chatml_folder(tmp_path, chat_template=templates)), model_max_length=64)
    assert tokenizer.chat_template == templates


# ------------------------------------------------------------------------------------------------------------------- ranks


def only_on_rank_0(folder):
    """Return the folder on rank 0, and a path that does not exist on other ranks."""
    return str(folder) if World.detect().is_main else f"/nowhere/rank{World.detect().rank}/{folder.name}"


def no_opening_below(folder):
    """Make this process fail from now on if it opens or lists anything in `folder`."""

    def watch(event, arguments):
        if event in ("open", "os.listdir", "os.scandir") and str(folder) in str(arguments[0]):
            os.write(2, f"rank {World.detect().rank} touched {arguments[0]}\n".encode())
            os._exit(3)

    sys.addaudithook(watch)


MAKERS = {"chatml": chatml_folder, "opt": opt_folder, "word_level": word_level_folder}


@pytest.mark.parametrize("kind", [*MAKERS, "vicuna", "bare"])
@pytest.mark.world_size(3)
def test_the_same_on_every_rank_from_files_of_rank_0(tmp_path, real_models, kind):
    world = World.detect()
    folder = tmp_path / kind
    if world.is_main:
        if kind in MAKERS:
            MAKERS[kind](folder)
        else:
            model_type, settings = KINDS[kind]
            sentencepiece_folder(folder, real_models / REAL["v1"], model_type, **settings)
    before = set(Path(tempfile.gettempdir()).glob("zero_sft_*"))
    tokenizer = load_tokenizer(only_on_rank_0(folder), model_max_length=77, padding_side="left")
    assert (tokenizer.model_max_length, tokenizer.padding_side) == (77, "left")
    assert tokenizer.name_or_path == only_on_rank_0(folder)
    assert tokenizer.pad_token_id is not None
    texts = [*TEXTS, " x", "</s>Hello <|im_end|>there", "hello unknown world"]
    mine = {
        "ids": [tokenizer.encode(each) for each in texts],
        "plain": [tokenizer.encode(each, add_special_tokens=False) for each in texts],
        "batch": tokenizer(texts, padding=True, truncation=True, max_length=20)["input_ids"],
        "text": [tokenizer.decode(tokenizer.encode(each)) for each in texts],
        "class": type(tokenizer).__qualname__,
        "special": [tokenizer.special_tokens_map, tokenizer.all_special_ids],
        "template": tokenizer.chat_template,
    }
    assert all_gather_json(world, mine) == [mine] * world.world_size
    if kind == "chatml":
        text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
        assert text == "<|im_start|>user\nhi<|im_end|>\n"
    if world.is_main:
        plain = ready(folder)
        assert [plain.encode(each) for each in texts] == mine["ids"]
        assert type(plain) is type(tokenizer)
    all_gather_json(world, None)
    assert set(Path(tempfile.gettempdir()).glob("zero_sft_*")) <= before, "nothing is left behind"


@pytest.mark.world_size(2)
@pytest.mark.slow
def test_only_rank_0_opens_the_files(tmp_path, real_models):
    """All ranks can see the folder; a rank other than 0 that opens or lists it dies."""
    folder = tmp_path / "model"
    if World.detect().is_main:
        sentencepiece_folder(folder, real_models / REAL["v1"], tokenizer_class="LlamaTokenizer")
    torch.distributed.barrier()
    if not World.detect().is_main:
        no_opening_below(tmp_path)
    assert load_tokenizer(str(folder), model_max_length=77).encode("Hello") == [1, 22557]


CODE = """
from transformers import PreTrainedTokenizerFast

from .mine_words import GREETING


class MineTokenizer(PreTrainedTokenizerFast):
    greeting = GREETING
"""


@pytest.mark.world_size(2)
def test_code_travels_where_it_is_trusted(tmp_path):
    world = World.detect()
    transformers.dynamic_module_utils.HF_MODULES_CACHE = str(tmp_path / f"modules{world.rank}")
    folder = tmp_path / "mine"
    if world.is_main:
        chatml_folder(folder, model_type="mine")
        (folder / "mine.py").write_text(CODE)
        (folder / "mine_words.py").write_text("GREETING = 'hello'\n")
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config |= {"tokenizer_class": "MineTokenizer", "auto_map": {"AutoTokenizer": [None, "mine.MineTokenizer"]}}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(only_on_rank_0(folder), model_max_length=77, trust_remote_code=True)
    assert (type(tokenizer).__name__, tokenizer.greeting) == ("MineTokenizer", "hello")
    with raises("tokenizer.unusable"):
        load_tokenizer(only_on_rank_0(folder), model_max_length=77)


def broken_json(folder):
    (chatml_folder(folder) / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BP')


def not_json(folder):
    (chatml_folder(folder) / "tokenizer_config.json").write_text("{")


def broken_model(folder):
    (write_config(folder, model_type="llama") / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15" + b"x" * 40)


def no_files(folder):
    config = write_config(folder, model_type="llama") / "tokenizer_config.json"
    config.write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))


def huge_id(folder):
    """The tokenizers library would list four billion ids, and end the process for lack of memory."""
    path = chatml_folder(folder) / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["a"] = 2**32 - 1
    path.write_text(json.dumps(content))


def panics(folder):
    """The file opens; the tokenizers library panics at the first text, since a special token is not described."""
    path = chatml_folder(folder) / "tokenizer.json"
    content = json.loads(path.read_text())
    piece = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    content["post_processor"] = {"type": "TemplateProcessing", "single": [piece], "pair": [], "special_tokens": {}}
    path.write_text(json.dumps(content))


FAULTS = {
    "panics": (panics, "tokenizer.unusable", "no entry found for key"),
    "missing": (lambda folder: None, "hub.no_such_folder", "model"),
    "broken_json": (broken_json, "tokenizer.unusable", "model"),
    "not_json": (not_json, "tokenizer.unusable", "model"),
    "broken_model": (broken_model, "tokenizer.unusable", "model"),
    "huge_id": (huge_id, "tokenizer.bad_ids", "4,294,967,295"),
    "no_files": (no_files, "tokenizer.no_files", "tokenizer.json, tokenizer.model"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.world_size(2)
def test_a_fault_on_rank_0_is_raised_by_all(tmp_path, fault):
    make, code, value = FAULTS[fault]
    if World.detect().is_main:
        make(tmp_path / "model")
    with raises(code, value) as raised:
        load_tokenizer(only_on_rank_0(tmp_path / "model"), model_max_length=77)
    said = all_gather_json(World.detect(), str(raised.value))
    assert said[0] == said[1]


@pytest.mark.world_size(2)
def test_unusable_arguments(tmp_path):
    for arguments, code, value in [
        ({"padding_side": "middle"}, "arguments.wrong_value", "'middle'"),
        ({"model_max_length": 0}, "arguments.wrong_value", "--model_max_length"),
        ({"revison": "x"}, "arguments.unknown", "Did you mean revision"),
    ]:
        with raises(code, value):
            load_tokenizer(str(tmp_path), **{"model_max_length": 77, **arguments})


def test_fingerprint_sees_what_matters(tmp_path):
    tokenizer = ready(chatml_folder(tmp_path))
    plain = fingerprint(tokenizer)
    for name, value in {"padding_side": "left", "chat_template": "x", "model_max_length": 1, "pad_token": "<|im_end|>"}.items():
        changed = ready(tmp_path)
        setattr(changed, name, value)
        assert fingerprint(changed) != plain, name
    assert json.loads(json.dumps(plain)) == plain
