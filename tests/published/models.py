"""Folders of published models: the config, generation and tokenizer files that people download, with tiny weights.

The keys and values are those that the publishers' pages show; sizes are cut down, vocabularies are not. Weights are random.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import trl

from tests import quantised
from tests.real_tokenizers import published_tokenizer

TEMPLATES = Path(trl.__file__).parent / "chat_templates"

_SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
_FP16_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "initializer_range": 0.02, "max_position_embeddings": 4096, "num_key_value_heads": 4, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16", "use_cache": True,
    "vocab_size": 32000, **_SIZES,
}  # fmt: skip
_LLAMA3_1 = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": 128001, "hidden_act": "silu", "initializer_range": 0.02,
    "max_position_embeddings": 131072, "mlp_bias": False, "num_key_value_heads": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 128256,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    **_SIZES,
}  # fmt: skip
_QWEN = {
    "attention_dropout": 0.0, "bos_token_id": 151643, "hidden_act": "silu", "initializer_range": 0.02, "max_window_layers": 2,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936, **_SIZES,
}  # fmt: skip
_QWEN3 = {
    **_QWEN, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "head_dim": 16,
    "max_position_embeddings": 40960, "eos_token_id": 151645,
}  # fmt: skip
_MISTRAL = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "attention_dropout": 0.0, "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 32768,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 32768, **_SIZES,
}  # fmt: skip
_GEMMA3_TEXT = {
    "attention_bias": False, "attention_dropout": 0.0, "attn_logit_softcapping": None, "cache_implementation": "hybrid",
    "final_logit_softcapping": None, "head_dim": 16, "hidden_activation": "gelu_pytorch_tanh", "initializer_range": 0.02,
    "max_position_embeddings": 32768, "model_type": "gemma3_text", "num_key_value_heads": 1, "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
    "sliding_window_pattern": 6, "use_cache": True, "vocab_size": 262144, **_SIZES, "num_hidden_layers": 6,
}  # fmt: skip
_OLMO2 = {
    "architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "attention_bias": False, "attention_dropout": 0.0,
    "eos_token_id": 100257, "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 4096,
    "num_key_value_heads": 4, "pad_token_id": 100277, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 500000,
    "tie_word_embeddings": False, "torch_dtype": "float32", "use_cache": False, "vocab_size": 100352, **_SIZES,
}  # fmt: skip
_DISTILLED = {
    **_QWEN, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "eos_token_id": 151643, "rope_theta": 10000,
    "max_position_embeddings": 131072, "sliding_window": 4096, "use_mrope": False,
}  # fmt: skip
_DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 1, "hidden_act": "silu",
    "initializer_range": 0.02, "kv_lora_rank": 32, "max_position_embeddings": 163840, "moe_intermediate_size": 64,
    "moe_layer_freq": 1, "n_group": 2, "n_routed_experts": 8, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_experts_per_tok": 2, "num_key_value_heads": 4, "num_nextn_predict_layers": 1, "q_lora_rank": 32,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "rms_norm_eps": 1e-06, "rope_theta": 10000, "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": 1, "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 16, "vocab_size": 129280,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    **_SIZES,
}  # fmt: skip
_GPT_OSS = {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True, "attention_dropout": 0.0,
    "eos_token_id": 200002, "experts_per_token": 2, "head_dim": 16, "hidden_act": "silu", "initial_context_length": 4096,
    "initializer_range": 0.02, "layer_types": ["sliding_attention", "full_attention"], "max_position_embeddings": 131072,
    "num_experts_per_tok": 2, "num_key_value_heads": 2, "num_local_experts": 4, "output_router_logits": False,
    "pad_token_id": 199999, "rms_norm_eps": 1e-05, "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128,
    "swiglu_limit": 7.0, "tie_word_embeddings": False, "use_cache": True, "vocab_size": 201088,
    "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096, "rope_type": "yarn",
        "truncate": False,
    },
    **_SIZES, "intermediate_size": 64,
}  # fmt: skip
_VISION = {
    "hidden_size": 32, "image_size": 28, "intermediate_size": 48, "model_type": "siglip_vision_model",
    "num_attention_heads": 2, "num_hidden_layers": 1, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip

LLAMA2_CHAT = (
    "{% if messages[0]['role'] == 'system' %}{% set first = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% for turn in turns %}{% if turn['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (first if loop.index0 == 0 else '') + turn['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + turn['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
PHI4 = (
    "{% for turn in messages %}{{ '<|im_start|>' + turn['role'] + '<|im_sep|>' + turn['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
OLMO2_INSTRUCT = (
    "{{ bos_token }}{% for turn in messages %}{{ '<|' + turn['role'] + '|>\n' + turn['content'] }}"
    "{% if turn['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n<|assistant|>\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedModel:
    """The files of one published model. `template`: a file of TRL's, Jinja, or None for the tokenizer's own; "" removes it."""

    config: Mapping[str, Any]
    generation: Mapping[str, Any] | None
    tokenizer: str
    template: str | None = None
    tokens: Mapping[str, Any] = field(default_factory=dict)  # changes to tokenizer_config.json
    quantised: str | None = None
    trained_template: str | None = None  # what `--chat_template` is given
    older_readers: bool = True  # whether transformers 4.57 knows the architecture


def _from_config(**settings: Any) -> dict[str, Any]:
    return {"_from_model_config": True, "transformers_version": "4.45.0", **settings}


_SAMPLED = {"do_sample": True, "temperature": 0.6, "top_p": 0.95}
_LLAMA2_SAMPLED = _from_config(
    bos_token_id=1, do_sample=True, eos_token_id=2, pad_token_id=0, temperature=0.6, max_length=4096, top_p=0.9
)
_LLAMA3_SAMPLED = _from_config(bos_token_id=128000, do_sample=True, eos_token_id=128001, temperature=0.6, top_p=0.9)
_LLAMA3_ENDS = [128001, 128008, 128009]
_GEMMA_GENERATION = {
    "cache_implementation": "hybrid", "do_sample": True, "eos_token_id": [1, 106], "pad_token_id": 0, "top_k": 64,
    "top_p": 0.95,
}  # fmt: skip
_R1_TOKENS = {
    "bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>", "pad_token": "<｜▁pad▁｜>",
    "tokenizer_class": "LlamaTokenizerFast", "model_max_length": 16384,
}  # fmt: skip
_CL100K = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 16384, "unk_token": "<|endoftext|>"}

MODELS: dict[str, PublishedModel] = {
    # temperature and top_p without do_sample, which transformers 5 refuses to save
    "vicuna-7b-v1.5": PublishedModel(
        config={**_FP16_LLAMA, "pad_token_id": 0},
        generation={"bos_token_id": 1, "eos_token_id": 2, "max_length": 4096, "pad_token_id": 0, "temperature": 0.9,
                    "top_p": 0.6, "transformers_version": "4.31.0"},
        tokenizer="llama2",
    ),
    "vicuna-7b-v1.5-16k": PublishedModel(
        config={**_FP16_LLAMA, "pad_token_id": 0, "max_sequence_length": 16384,
                "rope_scaling": {"factor": 4.0, "type": "linear"}},
        generation=_from_config(bos_token_id=1, eos_token_id=2, pad_token_id=0),
        tokenizer="llama2",
    ),
    "Llama-2-7b-hf": PublishedModel(config=_FP16_LLAMA, generation=_LLAMA2_SAMPLED, tokenizer="llama2"),
    "Llama-2-7b-chat-hf": PublishedModel(
        config=_FP16_LLAMA, generation=_LLAMA2_SAMPLED, tokenizer="llama2", template=LLAMA2_CHAT
    ),
    "Llama-3.1-8B": PublishedModel(
        config=_LLAMA3_1, generation=_LLAMA3_SAMPLED, tokenizer="llama3", template="", trained_template="llama3"
    ),
    "Llama-3.1-8B-Instruct": PublishedModel(
        config={**_LLAMA3_1, "eos_token_id": _LLAMA3_ENDS}, generation={**_LLAMA3_SAMPLED, "eos_token_id": _LLAMA3_ENDS},
        tokenizer="llama3_1", template="llama3_1.jinja", tokens={"eos_token": "<|eot_id|>"},
    ),
    "Llama-3.2-1B-Instruct": PublishedModel(
        config={**_LLAMA3_1, "eos_token_id": _LLAMA3_ENDS, "head_dim": 16, "tie_word_embeddings": True},
        generation={**_LLAMA3_SAMPLED, "eos_token_id": _LLAMA3_ENDS},
        tokenizer="llama3_1", template="llama3_2.jinja", tokens={"eos_token": "<|eot_id|>"},
    ),
    "Qwen2.5-7B-Instruct": PublishedModel(
        config={**_QWEN, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "eos_token_id": 151645,
                "max_position_embeddings": 32768, "sliding_window": 131072},
        generation={"bos_token_id": 151643, "pad_token_id": 151643, "do_sample": True, "eos_token_id": [151645, 151643],
                    "repetition_penalty": 1.05, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
        tokenizer="qwen2_5",
    ),
    "Qwen3-8B-Base": PublishedModel(
        config={**_QWEN3, "eos_token_id": 151643, "max_position_embeddings": 32768},
        generation={"bos_token_id": 151643, "do_sample": False, "eos_token_id": 151643, "max_new_tokens": 2048},
        tokenizer="qwen3", tokens={"eos_token": "<|endoftext|>"},
    ),
    "Qwen3-8B": PublishedModel(
        config=_QWEN3,
        generation={"bos_token_id": 151643, "pad_token_id": 151643, "eos_token_id": [151645, 151643], "top_k": 20, **_SAMPLED},
        tokenizer="qwen3",
    ),
    "Qwen3-30B-A3B": PublishedModel(
        config={**_QWEN3, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "decoder_sparse_step": 1,
                "mlp_only_layers": [], "moe_intermediate_size": 32, "norm_topk_prob": True, "num_experts": 8,
                "num_experts_per_tok": 2, "output_router_logits": False, "router_aux_loss_coef": 0.001},
        generation={"bos_token_id": 151643, "pad_token_id": 151643, "eos_token_id": [151645, 151643], "top_k": 20, **_SAMPLED},
        tokenizer="qwen3",
    ),
    "Mistral-7B-v0.3": PublishedModel(
        config=_MISTRAL, generation=_from_config(bos_token_id=1, eos_token_id=2), tokenizer="llama2"
    ),
    "Mistral-Nemo-Instruct-2407": PublishedModel(
        config={**_MISTRAL, "head_dim": 16, "max_position_embeddings": 131072, "vocab_size": 131072},
        generation=_from_config(bos_token_id=1, eos_token_id=2), tokenizer="mistral_nemo",
    ),
    "Mixtral-8x7B-v0.1": PublishedModel(
        config={**_MISTRAL, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_experts_per_tok": 2,
                "num_local_experts": 4, "output_router_logits": False, "router_aux_loss_coef": 0.02, "vocab_size": 32000},
        generation=_from_config(bos_token_id=1, eos_token_id=2), tokenizer="llama2",
    ),
    "gemma-3-1b-it": PublishedModel(
        config={**_GEMMA3_TEXT, "architectures": ["Gemma3ForCausalLM"], "bos_token_id": 2, "eos_token_id": [1, 106],
                "pad_token_id": 0, "torch_dtype": "bfloat16"},
        generation=_GEMMA_GENERATION, tokenizer="gemma3",
    ),
    "gemma-3-4b-it": PublishedModel(
        config={"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "boi_token_index": 255999,
                "eoi_token_index": 256000, "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02,
                "mm_tokens_per_image": 4, "torch_dtype": "bfloat16", "vision_config": _VISION,
                "text_config": {**_GEMMA3_TEXT, "vocab_size": 262208,
                                "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}},
        generation=_GEMMA_GENERATION, tokenizer="gemma3",
    ),
    "DeepSeek-R1": PublishedModel(
        config=_DEEPSEEK_V3, generation=_from_config(bos_token_id=0, eos_token_id=1, **_SAMPLED), tokenizer="deepseek_v3",
        template="deepseek_r1_distill.jinja", quantised="fp8",
    ),
    "DeepSeek-R1-Distill-Llama-8B": PublishedModel(
        config=_LLAMA3_1, generation=_from_config(bos_token_id=128000, eos_token_id=128001, **_SAMPLED),
        tokenizer="llama3_1", template="deepseek_r1_distill.jinja", tokens=_R1_TOKENS,
    ),
    "DeepSeek-R1-Distill-Qwen-1.5B": PublishedModel(
        config=_DISTILLED, generation=_from_config(bos_token_id=151646, eos_token_id=151643, **_SAMPLED),
        tokenizer="qwen2_5", template="deepseek_r1_distill.jinja",
        tokens={**_R1_TOKENS, "pad_token": "<｜end▁of▁sentence｜>", "additional_special_tokens": []},
    ),
    "phi-4": PublishedModel(
        config={"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "attention_bias": False, "attention_dropout": 0.0,
                "bos_token_id": 100257, "embd_pdrop": 0.0, "eos_token_id": 100265, "hidden_act": "silu",
                "initializer_range": 0.02, "max_position_embeddings": 16384, "num_key_value_heads": 2,
                "original_max_position_embeddings": 16384, "pad_token_id": 100349, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
                "rope_scaling": None, "rope_theta": 250000, "sliding_window": None, "tie_word_embeddings": False,
                "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 100352, **_SIZES},
        generation=_from_config(bos_token_id=100257, eos_token_id=[100257, 100265], pad_token_id=100349),
        tokenizer="gpt35turbo", template=PHI4,
        tokens={**_CL100K, "eos_token": "<|im_end|>", "pad_token": "<|dummy_85|>", "bos_token": "<|endoftext|>"},
    ),
    "OLMo-2-1124-7B": PublishedModel(
        config=_OLMO2, generation=_from_config(eos_token_id=100257, pad_token_id=100277), tokenizer="gpt35turbo",
        tokens={**_CL100K, "model_max_length": 8192, "pad_token": "<|pad|>", "eos_token": "<|endoftext|>", "bos_token": None},
    ),
    "OLMo-2-1124-7B-Instruct": PublishedModel(
        config={**_OLMO2, "torch_dtype": "bfloat16"}, generation=_from_config(eos_token_id=100257, pad_token_id=100277),
        tokenizer="gpt35turbo", template=OLMO2_INSTRUCT,
        tokens={**_CL100K, "pad_token": "<|pad|>", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"},
    ),
    "gpt-oss-20b": PublishedModel(
        config=_GPT_OSS,
        generation={"bos_token_id": 199998, "do_sample": True, "eos_token_id": [200002, 199999, 200012],
                    "pad_token_id": 199999},
        tokenizer="gptoss", template="gptoss.jinja", quantised="mxfp4",
    ),
}  # fmt: skip

_EXTRA_TOKENS = {
    "phi-4": {100264: "<|im_start|>", 100265: "<|im_end|>", 100266: "<|im_sep|>", 100349: "<|dummy_85|>"},
    "OLMo-2-1124-7B": {100277: "<|pad|>"},
    "OLMo-2-1124-7B-Instruct": {100277: "<|pad|>"},
    "DeepSeek-R1-Distill-Llama-8B": {
        128000: "<｜begin▁of▁sentence｜>", 128001: "<｜end▁of▁sentence｜>", 128011: "<｜User｜>", 128012: "<｜Assistant｜>",
        128013: "<think>", 128014: "</think>", 128015: "<｜▁pad▁｜>",
    },
    "DeepSeek-R1-Distill-Qwen-1.5B": {
        151643: "<｜end▁of▁sentence｜>", 151644: "<｜User｜>", 151645: "<｜Assistant｜>", 151646: "<｜begin▁of▁sentence｜>",
        151647: "<|EOT|>", 151648: "<think>", 151649: "</think>",
    },
}  # fmt: skip
"""Special tokens that these models add to another model's vocabulary, or put in the place of its own, by their ids."""


def write(name: str, folder: Path) -> Path:
    """Write the files of the model `name` to `folder`, with random weights in two files."""
    import transformers

    model = MODELS[name]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(model.config))
    config = transformers.AutoConfig.from_pretrained(folder)
    torch.manual_seed(11)
    built = getattr(transformers, model.config["architectures"][0])(config)
    built.to(getattr(torch, model.config.get("torch_dtype", "bfloat16"))).save_pretrained(folder, max_shard_size="24MB")
    if model.quantised == "fp8":
        quantised.fp8(folder, block=(16, 16))
    elif model.quantised == "mxfp4":
        quantised.mxfp4(folder)
    stored = json.loads((folder / "config.json").read_text())
    scheme = {"quantization_config": stored["quantization_config"]} if model.quantised else {}
    (folder / "config.json").write_text(json.dumps({**model.config, **scheme}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if model.generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(model.generation))
    _write_tokenizer(name, model, folder)
    return folder


def _write_tokenizer(name: str, model: PublishedModel, folder: Path) -> None:
    source = published_tokenizer(model.tokenizer)
    if name in _EXTRA_TOKENS:
        backend = json.loads((source / "tokenizer.json").read_text())
        present = {token["id"]: token for token in backend["added_tokens"]}
        for number, content in _EXTRA_TOKENS[name].items():
            if number in present:
                present[number]["content"] = content
                continue
            plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            backend["added_tokens"].append({"id": number, "content": content, "special": True, **plain})
            backend["model"]["vocab"][content] = number
        backend["added_tokens"].sort(key=lambda token: token["id"])
        (folder / "tokenizer.json").write_text(json.dumps(backend))
    else:
        shutil.copy(source / "tokenizer.json", folder)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings.pop("added_tokens_decoder" if name in _EXTRA_TOKENS else "", None)  # they stand in tokenizer.json
    settings.update({key: value for key, value in model.tokens.items() if value is not None})
    for key, value in model.tokens.items():
        if value is None:
            settings.pop(key, None)
    if model.template is not None:
        settings.pop("chat_template", None)
        template = (TEMPLATES / model.template).read_text() if model.template.endswith(".jinja") else model.template
        if template:
            settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False))
