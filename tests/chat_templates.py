"""Chat templates that behave as those of published models, written for these tests, and a tokenizer
of bytes and markers for each.

Kept: markers, line ends, trimming, where system messages and tools go, what happens to reasoning
and tool calls, what closes an answer. Left out: dates and the long texts about tools.
"""

import json
import re
from pathlib import Path

import tokenizers

CALLS = (
    "{% for call in m.tool_calls or [] %}"
    '<tool_call>\n{"name": "{{ call.function.name }}", '
    '"arguments": {{ call.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
)
TOOLS = "{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}"
CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nDEFAULT"
    "{% if tools %}\n# Tools" + TOOLS + "{% endif %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "<|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if loop.first and m.role == 'system' and tools %}\n# Tools" + TOOLS + "{% endif %}"
    "{% if m.tool_calls %}{% if m.content %}\n{% endif %}" + CALLS + "{% endif %}<|im_end|>\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (  # Qwen3: reasoning stays behind the last question only; SmolLM3 is alike
    "{% if tools %}<|im_start|>system\n# Tools" + TOOLS + "<|im_end|>\n{% endif %}"
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}"
    "{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "<|im_end|>\n{% elif m.role == 'assistant' %}"
    "{% set thought = m.reasoning_content or '' %}{% set said = m.content %}"
    "{% if '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "<think>\n{{ thought }}\n</think>\n\n{% endif %}{{ said }}" + CALLS + "<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
LLAMA31 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>\n\n"
    "{{ m.content | tojson }}<|eot_id|>"
    "{% elif m.tool_calls %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    '{"name": "{{ m.tool_calls[0].function.name }}", '
    '"parameters": {{ m.tool_calls[0].function.arguments | tojson }}}<|eot_id|>'
    "{% else %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{% if loop.first and tools %}Functions:" + TOOLS + "\n\n{% endif %}"
    "{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (  # v0.3: the system message and the tools stand in the last question
    "{{ bos_token }}{% set ns = namespace(system='') %}"
    "{% if messages[0].role == 'system' %}{% set ns.system = messages[0].content %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{% if loop.last or loop.index0 == messages | length - 2 %}"
    "{% if tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST] "
    "{% if ns.system %}{{ ns.system }}\n\n{% endif %}{% else %}[INST] {% endif %}"
    "{{ m.content }}[/INST]{% elif m.tool_calls %}[TOOL_CALLS] "
    "{{ m.tool_calls | map(attribute='function') | list | tojson }}{{ eos_token }}"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS] {{ m.content }}[/TOOL_RESULTS]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
PHI4 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
)
OLMO = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% if not (loop.last and m.role == 'assistant') %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
R1 = (  # distillations: reasoning is cut from every answer, the prompt opens the next one
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}<|User|>{{ m.content }}{% else %}<|Assistant|>"
    "{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
MODELS = {  # name: (template, eos)
    "qwen2.5": (CHATML.replace("DEFAULT", "You are Qwen."), "<|im_end|>"),
    "qwen3": (THINKING, "<|im_end|>"),
    "llama3.1": (LLAMA31, "<|eot_id|>"),
    "gemma": (GEMMA, "<eos>"),
    "mistral": (MISTRAL, "</s>"),
    "phi3": (PHI, "<|endoftext|>"),
    "phi4": (PHI4, "<|im_end|>"),
    "smollm2": (CHATML.replace("DEFAULT", "You are SmolLM."), "<|im_end|>"),
    "olmo2": (OLMO, "<|endoftext|>"),
    "r1": (R1, "</s>"),
}


def save(folder: Path, source: str, eos: str, more: dict | None = None) -> Path:
    """Write a tokenizer of bytes and of the markers in a template; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    marks = re.findall(r"<\|\w+\|>|</?\w+_of_turn>|\[/?[A-Z_]+\]|</?tool_\w+>|</?think>", source)
    roles = [f"<|{role}|>" for role in ("system", "user", "assistant")] * ("<|{{" in source)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(alphabet)}
    tok = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.pre_tokenizer = byte_level
    tok.decoder = tokenizers.decoders.ByteLevel()
    words = {mark for mark in marks if "think" in mark or "tool_" in mark}
    for mark in dict.fromkeys(["<s>", eos, *marks, *roles]):
        add = tok.add_tokens if mark in words else tok.add_special_tokens
        add([tokenizers.AddedToken(mark, special=mark not in words, normalized=False)])
    tok.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": eos, **(more or {})}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(source)
    return folder
