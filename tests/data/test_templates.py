"""`zero_sft.data.templates`: Vicuna's text to the character, and any chat template's answers found or refused."""

import pytest

from tests.data.tiny import CHATML, byte_tokenizer, conversation
from zero_sft.data.templates import VICUNA_SYSTEM, ModelTemplate, VicunaTemplate, choose_template, length_of_stop
from zero_sft.errors import DataError

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}<|im_end|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_end|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }}</s>{% else %}{{ raise_exception('no system texts') }}{% endif %}"
    "{% endfor %}"
)
THINKING = (  # as Qwen3: an empty block of thoughts opens the last answer, and none of the earlier ones
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN_END = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n### \n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
FORGETFUL = (  # earlier answers are cut short
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content if loop.last or m.role == 'user' else m.content[:3] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MOVING = (  # the whole begins with the number of messages, so no beginning of it is the text of fewer
    "{{ messages | length }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDLESS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
UPPER = "{% for m in messages %}{{ m.content | upper }}<|eot|>{% endfor %}"


def spans(rendered) -> list[str]:
    return [rendered.text[start:stop] for start, stop in rendered.spans]


def with_template(template: str) -> ModelTemplate:
    chosen = choose_template("model", byte_tokenizer(template))
    assert isinstance(chosen, ModelTemplate)
    return chosen


def test_vicuna_is_fastchats_character_for_character():
    rendered = VicunaTemplate().render(conversation("Hi", "Hello.", "More?", "No."))
    assert rendered.text == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
        "and polite answers to the user's questions. "
        "USER: Hi ASSISTANT: Hello.</s>USER: More? ASSISTANT: No.</s>"
    )
    assert spans(rendered) == [" Hello.</s>", " No.</s>"]


@pytest.mark.parametrize(
    "talk",
    [
        conversation("Hi", "Hello.", "More?", "No."),
        conversation("Hi", "Hello.", system='Be brief, "it\'s" {{ best }}.'),
        conversation("", "Hello.", "What?", ""),
    ],
)
def test_vicuna_as_a_chat_template_gives_the_tokens_that_are_trained_on(talk):
    tokenizer, template = byte_tokenizer(), VicunaTemplate()
    expected = tokenizer(template.render(talk).text).input_ids
    tokenizer.chat_template = template.jinja(tokenizer)
    messages = [{"role": turn.role, "content": turn.text} for turn in talk.turns]
    assert tokenizer.apply_chat_template(messages, return_dict=False) == expected
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False)
    assert prompt == "<s>" + template.prompt("Hi")


def test_vicuna_with_a_system_text_of_its_own():
    rendered = VicunaTemplate().render(conversation("Hi", "Hello.", system="Be brief."))
    assert rendered.text == "Be brief. USER: Hi ASSISTANT: Hello.</s>"


def test_vicuna_leaves_out_the_separators_of_empty_texts_as_fastchat_does():
    rendered = VicunaTemplate().render(conversation("", "a", "b", "", "c", "d"))
    assert rendered.text == f"{VICUNA_SYSTEM} USER:ASSISTANT: a</s>USER: b ASSISTANT:USER: c ASSISTANT: d</s>"
    assert spans(rendered) == [" a</s>", " d</s>"]


@pytest.mark.parametrize(
    ("template", "text", "answers"),
    [
        (
            CHATML,
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n Hello. <|im_end|>\n"
            "<|im_start|>user\nMore?<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>\n",
            [" Hello. <|im_end|>", "No.<|im_end|>"],
        ),
        (
            LLAMA3,
            "<s><|im_start|>user<|im_end|>\n\nHi<|eot|><|im_start|>assistant<|im_end|>\n\nHello.<|eot|>"
            "<|im_start|>user<|im_end|>\n\nMore?<|eot|><|im_start|>assistant<|im_end|>\n\nNo.<|eot|>",
            ["Hello.<|eot|>", "No.<|eot|>"],
        ),
        (MISTRAL, "<s>[INST] Hi [/INST] Hello.</s>[INST] More? [/INST] No.</s>", [" Hello.</s>", " No.</s>"]),
        (
            THINKING,
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n Hello. <|im_end|>\n"
            "<|im_start|>user\nMore?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nNo.<|im_end|>\n",
            [" Hello. <|im_end|>", "No.<|im_end|>"],
        ),
        (
            PLAIN_END,
            "user: Hi\n### \nassistant:  Hello. \n### \nuser: More?\n### \nassistant: No.\n### \n",
            ["  Hello. \n###", " No.\n###"],
        ),
    ],
)
def test_answers_are_found_in_any_template(template, text, answers):
    rendered = with_template(template).render(conversation("Hi", " Hello. ", "More?", "No."))
    assert rendered.text == text
    assert spans(rendered) == answers


def test_an_answer_that_repeats_the_prompt_or_the_ending_is_found():
    texts = ("assistant\n", "<|im_start|>assistant\n", "im_end", "im_end", "\n", "a<|im_end|>\nb", "x", "zerosftanswer")
    rendered = with_template(CHATML).render(conversation(*texts))
    assert spans(rendered) == [f"{text}<|im_end|>" for text in texts[1::2]]


def test_empty_answers_are_not_trained_on():
    rendered = with_template(CHATML).render(conversation("a", "", "b", "c"))
    assert "assistant\n<|im_end|>" in rendered.text
    assert spans(rendered) == ["c<|im_end|>"]
    assert with_template(CHATML).render(conversation()).spans == ()


@pytest.mark.parametrize("template", [FORGETFUL, MOVING, UPPER])
def test_a_template_that_rewrites_turns_is_refused(template):
    with pytest.raises(DataError, match=r"here, message 2: .*rewrites the turns.*--chat_template vicuna"):
        with_template(template).render(conversation("Hi", "Hello.", "More?", "No."))


def test_a_template_without_an_end_is_refused():
    with pytest.raises(DataError, match="could not learn to stop"):
        with_template(ENDLESS).render(conversation("Hi", "Hello."))


def test_a_template_that_fails_is_named_with_the_sample():
    with pytest.raises(DataError, match="here: the model's chat template can't render this conversation: no system texts"):
        with_template(MISTRAL).render(conversation("Hi", "Hello.", system="Be brief."))


def test_length_of_stop():
    marks = ("<|end|>", "<|end|>\n", "<|user|>")
    assert length_of_stop(" <|end|><|user|>", marks) == len(" <|end|>")
    assert length_of_stop("<|end|>\n\n", marks) == len("<|end|>\n")
    assert length_of_stop(" STOP \n", marks) == len(" STOP")
    assert length_of_stop("\n", marks) == 0


def test_choice():
    assert choose_template(None, byte_tokenizer()) == VicunaTemplate(stop="</s>")
    assert choose_template(None, byte_tokenizer(CHATML)).name == "model"
    assert choose_template("vicuna", byte_tokenizer(CHATML)).name == "vicuna"
    with pytest.raises(DataError, match="has no chat template"):
        choose_template("model", byte_tokenizer())
    with pytest.raises(DataError, match="unknown chat template"):
        choose_template("alpaca", byte_tokenizer())


def test_vicunas_stop_is_one_token_of_the_model():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel(vocab={"<unk>": 0, "<|endoftext|>": 1}, unk_token="<unk>"))
    template = choose_template("vicuna", PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>"))
    assert spans(template.render(conversation("Hi", "Hello."))) == [" Hello.<|endoftext|>"]
    with pytest.raises(DataError, match="no end-of-sequence token"):
        choose_template("vicuna", PreTrainedTokenizerFast(tokenizer_object=backend))
