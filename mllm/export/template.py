"""The LLM's chat template, made to read content parts, so that stock processors and servers ask as we do.

Enters: the tokenizer's own template. Leaves: a template that first turns every message's parts (`{type: image}`,
`{type: text, text}`) into the words that the LLM's template was trained with, then goes on as that template.

Where the image stands: at its part. Images in front of the words get one newline behind them, as in `mllm chat` and
in LLaVA's data; words that begin with a newline of their own get no second one. Thinking is off unless asked for.
"""

from __future__ import annotations

from mllm.types import IMAGE_TOKEN

PRELUDE = """\
{%- if enable_thinking is not defined -%}{%- set enable_thinking = false -%}{%- endif -%}
{%- set conversation = namespace(turns=[]) -%}
{%- for message in messages -%}
    {%- if message['content'] is string or message['content'] is not iterable -%}
        {%- set conversation.turns = conversation.turns + [message] -%}
    {%- else -%}
        {%- set turn = namespace(text='', images_only=true) -%}
        {%- for content in message['content'] -%}
            {%- if content['type'].startswith('image') -%}
                {%- set turn.text = turn.text + 'IMAGE_TOKEN' -%}
            {%- elif content['type'] == 'text' -%}
                {%- if turn.images_only and turn.text and not content['text'].startswith('\\n') -%}
                    {%- set turn.text = turn.text + '\\n' -%}
                {%- endif -%}
                {%- set turn.text = turn.text + content['text'] -%}
                {%- set turn.images_only = false -%}
            {%- endif -%}
        {%- endfor -%}
        {%- set conversation.turns = conversation.turns + [dict(message, content=turn.text)] -%}
    {%- endif -%}
{%- endfor -%}
{%- set messages = conversation.turns -%}
""".rstrip("\n").replace("IMAGE_TOKEN", IMAGE_TOKEN)


def with_parts(template: str) -> str:
    """`template`, reading parts; what it prints for plain strings is unchanged."""
    return PRELUDE + "{{ '' }}" + template  # the empty output keeps Jinja from trimming the template's first newline
