"""Opens exported folders as a user of plain transformers does, in any release of it, and reports what it got as JSON.

    python tests/published/reader.py [--before ANSWER] QUESTION FOLDER ...

One line for each folder: `{"prompt": ids, "answer": text, "stopped": bool, "logits": numbers}`, where the logits are the first
64 of the last position; or `{"error": text}`. With `--before`, the prompt is what the template writes before that answer in
training, instead of the template's generation prompt.
"""

import argparse
import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

MOST_TOKENS = 40


def read(folder, question, trained_answer=None):
    """Answer one question with the folder's own tokenizer, chat template and generation config."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    messages = [{"role": "user", "content": question}]
    if trained_answer is None:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=False, tokenize=False)
    else:
        conversation = [*messages, {"role": "assistant", "content": trained_answer}]
        text = tokenizer.apply_chat_template(conversation, tokenize=False).rpartition(trained_answer)[0]
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    model.generation_config.max_length = None
    with torch.no_grad():
        logits = model(ids).logits[0, -1, :64].float().tolist()
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=MOST_TOKENS, do_sample=False)
    new = out[0, ids.shape[1] :].tolist()
    ends = model.generation_config.eos_token_id
    stopped = new[-1] in (ends if isinstance(ends, list) else [ends])
    answer = tokenizer.decode(new, skip_special_tokens=True).strip()
    return {"prompt": ids[0].tolist(), "answer": answer, "stopped": stopped, "logits": logits}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("question")
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--before")
    options = parser.parse_args()
    for path in options.folders:
        try:
            result = read(path, options.question, options.before)
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(result), flush=True)
