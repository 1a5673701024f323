"""`zero_sft.data.templates.choose`: Vicuna's text to the character, and any chat template's answers found or refused."""

import signal
import time

import pytest

from tests.data.tiny import CHATML, byte_tokenizer, conversation
from tests.errors import raises
from zero_sft.data.samples.conversation import ASSISTANT, TOOL, Conversation, Turn
from zero_sft.data.templates import jinja, probe, render
from zero_sft.data.templates.choose import choose_template
from zero_sft.data.templates.jinja import ChatTemplate
from zero_sft.data.templates.probe import find_turn_ends
from zero_sft.data.templates.vicuna import VICUNA_SYSTEM, VicunaTemplate

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
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content if loop.last or m.role == 'user' else m.content[:20] }}"
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
EXCERPT = CHATML.replace("m.content", "m.content[-20:]")


def spans(rendered) -> list[str]:
    return [rendered.text[start:stop] for start, stop in rendered.spans]


def with_template(template: str) -> ChatTemplate:
    chosen = choose_template("model", byte_tokenizer(template))
    assert isinstance(chosen, ChatTemplate)
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
    with pytest.raises(Exception, match="no turns of tools"):
        tokenizer.apply_chat_template([*messages, {"role": "tool", "content": "5"}])


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


def test_a_template_that_rewrites_turns_is_refused():
    texts = ("Hi", "Hello, how are you today?", "More?", "No, I am not sure of it.")
    with raises("data.template_rewrites_turns", "here, message 2:", "--chat_template vicuna"):
        with_template(FORGETFUL).render(conversation(*texts))
    with raises("data.template_drops_text", "here", "message 1", "user"):
        with_template(EXCERPT).render(conversation(*texts))


SYSTEMLESS = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
TOOLLESS = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")
QUOTED = CHATML.replace("m.content", "(m.content | tojson if m.role == 'tool' else m.content)")


def test_a_text_that_the_template_has_no_place_for():
    """Not even where it stands in another text, too."""
    talk = conversation("a", "a", "b", "c", system="a")
    with raises("data.template_drops_text", "here", "message 1", "system"):
        with_template(SYSTEMLESS).render(talk)
    assert with_template(TOOLLESS).render(talk)
    turns = [*conversation("a", "a").turns, Turn(role=TOOL, text='"5"'), Turn(role=ASSISTANT, text="d")]
    asked = Conversation(turns=tuple(turns), where="here")
    with raises("data.template_drops_text", "here", "message 3", "tool"):
        with_template(TOOLLESS).render(asked)
    assert spans(with_template(QUOTED).render(asked)) == ["a<|im_end|>", "d<|im_end|>"]


def test_thoughts_that_contain_the_prompt_are_trained_on_whole():
    thoughts = "<think>\nit goes <|im_start|>assistant\n, I think\n</think>\n\n"
    rendered = with_template(CHATML).render(conversation("Hi", f"{thoughts}Hello."))
    assert spans(rendered) == [f"{thoughts}Hello.<|im_end|>"]


def test_thoughts_that_name_their_own_tag_are_whole_or_refused():
    """Templates take what follows the last tag for the thoughts; what is before it would be lost without a word."""
    last = "'<think>' + m.content.split('</think>')[0].split('<think>')[-1] + '</think>'"
    cut = CHATML.replace(
        "{{ m.content }}", f"{{{{ {last} if '</think>' in m.content }}}}{{{{ m.content.split('</think>')[-1] }}}}"
    )
    answer = "<think>the tag <think> opens thoughts</think>B"
    assert spans(with_template(CHATML).render(conversation("Hi", answer))) == [f"{answer}<|im_end|>"]
    assert spans(with_template(cut).render(conversation("Hi", "<think>x</think>B"))) == ["<think>x</think>B<|im_end|>"]
    with raises("data.template_rewrites_turns", "here, message 2:"):
        with_template(cut).render(conversation("Hi", answer))


def test_an_answer_of_which_nothing_is_left_is_refused():
    forgetting = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] | trim }}")
    for answer in ("<think>x</think>", "<think>x</think>\n"):
        with raises("data.nothing_left_of_answer", "message 2"):
            with_template(forgetting).render(conversation("Hi", answer, "More?", "No."))
    assert spans(with_template(forgetting).render(conversation("Hi", "<think>x</think>A"))) == ["A<|im_end|>"]


def test_a_text_is_judged_alike_with_and_without_the_cache(monkeypatch):
    template = with_template(QUOTED)
    turns = [*conversation("a", "b").turns, Turn(role=TOOL, text='"5"'), Turn(role=ASSISTANT, text="d")]
    for _ in range(2):
        assert spans(template.render(Conversation(turns=tuple(turns), where="here"))) == ["b<|im_end|>", "d<|im_end|>"]
    monkeypatch.setattr(jinja, "_texts_around", jinja._texts_around.__wrapped__)
    assert spans(template.render(Conversation(turns=tuple(turns), where="here"))) == ["b<|im_end|>", "d<|im_end|>"]


def test_a_template_that_divides_by_nothing():
    with raises("data.template_fails", "zero"):
        with_template("{{ 1 // 0 }}" + CHATML)


def test_the_prompt_that_is_always_there_is_no_end_of_an_answer():
    always = CHATML.replace("{% if add_generation_prompt %}", "").replace("{% endif %}", "{{ '' }}")
    rendered = with_template(always).render(conversation("Hi", "Hello.", "More?", "No."))
    assert spans(rendered) == ["Hello.<|im_end|>", "No.<|im_end|>"]


def test_a_template_that_leaves_nothing_as_it_is_is_refused():
    with raises("data.template_changes_texts", "--chat_template vicuna"):
        with_template(UPPER)


def test_the_number_of_messages_may_be_told():
    rendered = with_template(MOVING).render(conversation("Hi", "Hello.", "More?", "No."))
    assert spans(rendered) == ["Hello.<|im_end|>", "No.<|im_end|>"]


def test_a_template_without_an_end_is_refused():
    with raises("data.template_without_turn_end"):
        with_template(ENDLESS).render(conversation("Hi", "Hello."))


def test_a_template_that_fails_is_named_with_the_sample():
    with raises("data.template_fails", "here", "no system texts"):
        with_template(MISTRAL).render(conversation("Hi", "Hello.", system="Be brief."))


@pytest.mark.parametrize(
    ("middle", "last", "stops"),
    [
        ("<|end|>\n<|user|>", "<|end|>\n", ("<|end|>",)),
        ("<|end|><|user|>", "<|end|>", ("<|end|>",)),
        ("<|a|><|end|><|user|>", "<|a|><|end|>", ("<|a|><|end|>",)),
        ("<|end|><|user|>", "<|a|>", ("<|end|>", "<|a|>")),
        (" <|end|> x", " <|end|>", (" <|end|>",)),
        (" STOP \nuser", " STOP \n", (" STOP",)),
        ("<|user|>", "", ("<|user|>",)),
        ("<|end|>\n<|a|>user", "<|end|>\n<|a|>assistant", ("<|end|>",)),
        ("\nuser", "\n", ()),
        ("<|other|>user", "<|othello|>", ()),
    ],
)
def test_what_ends_an_answer(middle, last, stops):
    assert find_turn_ends(middle, last, ("<|user|>", "<|end|>", "<|a|>")) == stops


def test_choice():
    assert choose_template(None, byte_tokenizer()) == VicunaTemplate(turn_end="</s>")
    assert choose_template(None, byte_tokenizer(CHATML)).name == "model"
    assert choose_template("vicuna", byte_tokenizer(CHATML)).name == "vicuna"
    with raises("data.model_without_template"):
        choose_template("model", byte_tokenizer())
    with raises("data.no_such_template", "nowhere.jinja"):
        choose_template("nowhere.jinja", byte_tokenizer())
    with raises("data.unknown_template", "vicuna, chatml, llama3, hermes, model"):
        choose_template("alpaca", byte_tokenizer())


def test_templates_by_name_and_from_a_file(tmp_path):
    tokenizer = byte_tokenizer()
    talk = conversation("Hi", "Hello.", "More?", "No.", system="Be brief.")
    rendered = choose_template("chatml", tokenizer).render(talk)
    assert rendered.text.startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert spans(rendered) == ["Hello.<|im_end|>", "No.<|im_end|>"]
    with raises("data.template_token_missing", "llama3", "<|eot_id|>"):
        choose_template("llama3", tokenizer)
    tokenizer.add_tokens(["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"], special_tokens=True)
    rendered = choose_template("llama3", tokenizer).render(talk)
    assert rendered.text.startswith(
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user"
    )
    assert spans(rendered) == ["Hello.<|eot_id|>", "No.<|eot_id|>"]
    path = tmp_path / "mine.jinja"
    path.write_text(MISTRAL)
    template = choose_template(str(path), tokenizer)
    assert spans(template.render(conversation("Hi", "Hello."))) == [" Hello.</s>"]
    assert template.jinja(tokenizer) == MISTRAL
    path.write_text("Hi\n{% for %}")
    with raises("data.template_not_jinja", "line 2"):
        choose_template(str(path), tokenizer)


def test_vicunas_stop_is_one_token_of_the_model():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel(vocab={"<unk>": 0, "<|endoftext|>": 1}, unk_token="<unk>"))
    template = choose_template("vicuna", PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>"))
    assert spans(template.render(conversation("Hi", "Hello."))) == [" Hello.<|endoftext|>"]
    backend.add_tokens(["</s>"])  # HTML's end of what is struck through, as in Gemma 3's vocabulary
    template = choose_template("vicuna", PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>"))
    assert spans(template.render(conversation("Hi", "Hello."))) == [" Hello.<|endoftext|>"]
    with raises("data.tokenizer_without_eos"):
        choose_template("vicuna", PreTrainedTokenizerFast(tokenizer_object=backend))


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(9999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ range(99999) | map('string') | list }}" * 300,
    ],
)
def test_a_template_that_loops_ends(monkeypatch, source):
    """Within the time limit, in one error; and another timer of the process goes on."""
    monkeypatch.setattr(render, "RENDER_SECONDS", 0.5)
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(None))
    try:
        signal.setitimer(signal.ITIMER_REAL, 1.0)
        began = time.monotonic()
        with raises("data.template_loops", "more than 0.5 s"):
            probe.probe_template(byte_tokenizer(), source)
        assert time.monotonic() - began < 5
        time.sleep(1.2)
        assert rung == [None]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
