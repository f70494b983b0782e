"""Chat templates in the manner of real families of LLMs, each with the special tokens that it needs.

They are written here, shorter than the originals, and keep what makes each of them hard: headers, default system
prompts, thinking, stripping, refusals, other names of roles, tokens that swallow white space.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import AddedToken, PreTrainedTokenizerFast

from conftest import make_tokenizer


@dataclass(frozen=True)
class Family:
    """A template, and what the tests must know of it."""

    template: str | None
    end: str
    """The end mark behind an answer, white space before it included."""
    special: tuple[str, ...] = ()
    eos: str = "<|end|>"
    bos: str = "<s>"
    swallows: tuple[str, ...] = ()
    """Special tokens that take the white space behind them."""
    trims: bool = False
    system: bool = True
    """Whether the template takes a system turn."""

    def tokenizer(self) -> PreTrainedTokenizerFast:
        tokenizer = make_tokenizer(self.template)
        added = [AddedToken(token, rstrip=token in self.swallows) for token in self.special]
        tokenizer.add_tokens(added, special_tokens=True)
        tokenizer.add_special_tokens({"eos_token": self.eos, "bos_token": self.bos})
        return tokenizer


CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m.role != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3 = (
    "{%- set ns = namespace(last=0) %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}"
    "{%- set content = m.content.split('</think>')[-1].lstrip('\n') if '</think>' in m.content else m.content %}"
    "{%- if loop.index0 > ns.last and loop.last %}"
    "{{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' + content.lstrip('\n') }}"
    "{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}"
    "{{- '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for m in loop_messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + m['content'] %}"
    "{% else %}{% set content = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = m['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
VICUNA = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ m.content + ' ' }}"
    "{% elif m.role == 'user' %}{{ 'USER: ' + m.content + ' ASSISTANT:' }}"
    "{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<｜Assistant｜>' + m.content + '<｜end▁of▁sentence｜>' }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
GENERATION = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}<|assistant|>{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
    "{% else %}<|{{ m.role }}|>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SMOLLM3 = (
    "{%- set mode = '/think' if (enable_thinking | default(true)) else '/no_think' -%}"
    "{{- '<|im_start|>system\n## Metadata\n\nToday Date: ' + strftime_now('%d %B %Y') + '\nReasoning Mode: ' + mode }}"
    "{%- if messages[0].role == 'system' %}{{- '\n\n' + messages[0].content.rstrip() }}{%- endif -%}"
    "{{- '<|im_end|>\n' }}"
    "{%- for m in messages -%}"
    "{%- if m.role == 'user' -%}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
    "{%- elif m.role == 'assistant' -%}{% generation %}"
    "{%- if mode == '/think' -%}{{ '<|im_start|>assistant\n' + m.content.lstrip('\n') + '<|im_end|>\n' }}"
    "{%- else -%}{{ '<|im_start|>assistant\n<think>\n\n</think>\n' + m.content.lstrip('\n') + '<|im_end|>\n' }}"
    "{%- endif -%}{% endgeneration %}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{ '<|im_start|>assistant\n' if mode == '/think' else '<|im_start|>assistant\n<think>\n\n</think>\n' }}"
    "{%- endif -%}"
)
OLMO2 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}"
    "{{ '<|assistant|>\n' + m['content'] + eos_token + ('' if loop.last else '\n') }}"
    "{% else %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '\n' }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
IM = ("<|im_start|>", "<|im_end|>")
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

FAMILIES = {
    "qwen2": Family(CHATML, "<|im_end|>", IM, eos="<|im_end|>"),
    "qwen3": Family(QWEN3, "<|im_end|>", (*IM, "<think>", "</think>"), eos="<|im_end|>"),
    "llama3": Family(LLAMA3, "<|eot_id|>", HEADERS, eos="<|eot_id|>", trims=True),
    "llama2": Family(LLAMA2, " </s>", ("</s>",), eos="</s>", trims=True),
    "mistral": Family(MISTRAL, "</s>", ("</s>",), eos="</s>", system=False),
    "gemma": Family(GEMMA, "<end_of_turn>", ("<start_of_turn>", "<end_of_turn>"), trims=True, system=False),
    "zephyr": Family(ZEPHYR, "</s>", ("</s>",), eos="</s>"),
    "phi3": Family(PHI3, "<|end|>", ("<|assistant|>", "<|end|>"), swallows=("<|assistant|>", "<|end|>")),
    "vicuna": Family(VICUNA, "</s>", ("</s>",), eos="</s>"),
    "deepseek": Family(
        DEEPSEEK,
        "<｜end▁of▁sentence｜>",
        ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
        eos="<｜end▁of▁sentence｜>",
    ),
    "smollm3": Family(SMOLLM3, "<|im_end|>", IM, eos="<|im_end|>"),
    "olmo2": Family(OLMO2, "<|endoftext|>", ("<|endoftext|>",), eos="<|endoftext|>"),
    "generation": Family(GENERATION, "<|end|>"),
    "none": Family(None, "<|end|>"),
}
