#!/usr/bin/env python3
"""Writes tests/data/chat/goldens.json: conversations as transformers' apply_chat_template writes them, text and ids.

    python scripts/make_chat_goldens.py

The templates are written here, as short as each family's documented format allows; those of published models say the same
with tools, documents and pictures besides. The tokenizer is the one of tests/data/tokenizer with each family's markers
added as special tokens. Runs with the transformers of tests/requirements.txt.
"""
import datetime
import json
from pathlib import Path

import transformers
import transformers.utils.chat_template_utils as chat_template_utils
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "tests/data/tokenizer/tokenizer.json"
OUTPUT = ROOT / "tests/data/chat/goldens.json"
TODAY = datetime.datetime(2026, 3, 5)

EACH = "{% for message in messages %}"
END = "{% endfor %}"
CHATML = "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
ANSWER = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"


def chatml(default=""):
    first = "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n" + default + "<|im_end|>\\n' }}{% endif %}"
    return EACH + (first if default else "") + CHATML + END + ANSWER


QWEN3_PLAIN = """
{%- if messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- if '</think>' in content %}{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
        {{- '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
# The last answer shows what it thought.
QWEN3 = QWEN3_PLAIN.replace("{%- if '</think>' in content %}", """{%- set reasoning_content = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            """).replace("""        {{- '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}""", """
        {%- if loop.last %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}{{- '<|im_start|>' + message.role + '\\n' + content }}{%- endif %}
        {{- '<|im_end|>\\n' }}""")
QWEN3_THINKING = QWEN3.replace("""{{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}""",
                               "{{- '<|im_start|>assistant\\n<think>\\n' }}")

SMOLLM3 = """
{%- set mode = "/think" -%}
{{- "<|im_start|>system\\n" -}}
{%- set instructions = "" -%}
{%- if messages[0].role == "system" -%}
    {%- set instructions = messages[0].content -%}
    {%- if "/no_think" in instructions -%}{%- set mode = "/no_think" -%}{%- endif -%}
{%- endif -%}
{%- set custom_instructions = instructions.replace("/no_think", "").replace("/think", "").rstrip() -%}
{%- if "/system_override" in instructions -%}
    {{- custom_instructions.replace("/system_override", "").rstrip() + "<|im_end|>\\n" -}}
{%- else -%}
    {{- "## Metadata\\n\\nKnowledge Cutoff Date: June 2025\\nToday Date: " + strftime_now("%d %B %Y") + "\\n" -}}
    {{- "Reasoning Mode: " + mode + "\\n\\n## Custom Instructions\\n\\n" -}}
    {%- if custom_instructions -%}{{- custom_instructions + "\\n\\n" -}}
    {%- elif mode == "/think" -%}{{- "You are a helpful AI assistant named SmolLM. Use <think> first.\\n\\n" -}}
    {%- else -%}{{- "You are a helpful AI assistant named SmolLM, \\"quiet\\".\\n\\n" -}}
    {%- endif -%}
{%- endif -%}
{%- for message in messages -%}
    {%- set empty = "" if mode == "/think" else "<think>\\n\\n</think>\\n" -%}
    {%- if message.role == "user" -%}{{ "<|im_start|>user\\n" + message.content + "<|im_end|>\\n" }}
    {%- elif message.role == "assistant" -%}
        {{ "<|im_start|>assistant\\n" + empty + message.content.lstrip("\\n") + "<|im_end|>\\n" }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ "<|im_start|>assistant\\n" + ("" if mode == "/think" else "<think>\\n\\n</think>\\n") }}
{%- endif -%}"""

LLAMA3_TURN = "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>'"
LLAMA3_ANSWER = "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
LLAMA3 = "{{ bos_token }}" + EACH + "{{ " + LLAMA3_TURN + " }}" + END + LLAMA3_ANSWER


def llama31(date):
    return ("{{- bos_token }}" + date + """
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}{{- "<|eot_id|>" }}
{%- for message in messages %}{{- """ + LLAMA3_TURN + " }}{%- endfor %}" + LLAMA3_ANSWER.replace("{{", "{{-"))


LLAMA31 = llama31('{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}')
LLAMA32 = llama31('{%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}'
                  '{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}')

SYSTEM_APART = ("{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
                "{% set system_message = messages[0]['content'] %}"
                "{% else %}{% set loop_messages = messages %}{% endif %}")
LLAMA2 = (SYSTEM_APART + "{% for message in loop_messages %}{% set content = message['content'] %}"
          "{% if loop.index0 == 0 and system_message is defined %}"
          "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + content %}{% endif %}"
          "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
          "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}" + END)
MISTRAL_OLD = ("{{ bos_token }}" + EACH + "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
               "{% else %}{{ message['content'] + eos_token }}{% endif %}" + END)
MISTRAL_V1 = (SYSTEM_APART + "{{ bos_token }}{% for message in loop_messages %}{% if message['role'] == 'user' %}"
              "{% if loop.first and system_message is defined %}"
              "{{ ' [INST] ' + system_message + '\\n\\n' + message['content'] + ' [/INST]' }}"
              "{% else %}{{ ' [INST] ' + message['content'] + ' [/INST]' }}{% endif %}"
              "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}" + END)
MISTRAL_V3 = (SYSTEM_APART + "{{ bos_token }}{% for message in loop_messages %}{% if message['role'] == 'user' %}"
              "{% if loop.last and system_message is defined %}"
              "{{ \"[INST] \" + system_message + \"\\n\\n\" + message[\"content\"] + \"[/INST]\" }}"
              "{% else %}{{ \"[INST] \" + message[\"content\"] + \"[/INST]\" }}{% endif %}"
              "{% else %}{{ \" \" + message[\"content\"]|trim + eos_token }}{% endif %}" + END)
TEKKEN = MISTRAL_V3.replace('"[INST] "', '"[INST]"').replace('" " + message["content"]|trim', 'message["content"]|trim')
MISTRAL_V7 = ("{{ bos_token }}" + EACH + "{% if message['role'] == 'system' %}"
              "{{ '[SYSTEM_PROMPT]' + message['content'] + '[/SYSTEM_PROMPT]' }}"
              "{% elif message['role'] == 'user' %}{{ '[INST]' + message['content'] + '[/INST]' }}"
              "{% else %}{{ message['content'] + eos_token }}{% endif %}" + END)
PHI3 = (EACH + "{{ '<|' + message['role'] + '|>' + '\\n' + message['content'] + '<|end|>\\n' }}" + END +
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}")
PHI3_FIRST = ("{{ bos_token }}" + EACH + "{% if message['role'] == 'user' %}"
              "{{ '<|user|>' + '\\n' + message['content'] + '<|end|>' + '\\n' + '<|assistant|>' + '\\n' }}"
              "{% elif message['role'] == 'assistant' %}{{ message['content'] + '<|end|>' + '\\n' }}{% endif %}" + END)
PHI4_MINI = (EACH + "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}" + END +
             "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}")
PHI4 = (EACH + "{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' }}" + END +
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}")
GRANITE_TURN = "{{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + '<|end_of_text|>\\n' }}"
GRANITE_ANSWER = "{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}"
GRANITE30 = EACH + GRANITE_TURN + END + GRANITE_ANSWER
GRANITE31 = ("""{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}{%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set system_message = "Knowledge Cutoff Date: April 2024.\\nToday's Date: " + strftime_now('%B %d, %Y') + ".\\nYou are Granite, developed by IBM." %}
    {%- set system_message = system_message + " You are a helpful AI assistant." %}{%- set loop_messages = messages %}
{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system_message + '<|end_of_text|>\\n' }}
{%- for message in loop_messages %}""" + GRANITE_TURN + "{%- endfor %}" + GRANITE_ANSWER)
GRANITE33 = GRANITE31.replace("2024.\\nToday", "2024. Today").replace('".\\nYou', '". You')
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n' + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

IM = ["<|im_start|>", "<|im_end|>"]
THINK = ["<think>", "</think>"]  # added, but not special
HEADERS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
ROLES = ["<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"]
PHI = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
S = ["<s>", "</s>"]
INST = S + ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
# title, recognized as, template, markers, and options: bos, eos, rstrip (of the markers), system (whether one is possible).
FAMILIES = [
    ("ChatML", "ChatML", chatml(), IM, {}),
    ("SmolLM2", "ChatML", chatml("You are a helpful AI assistant named SmolLM, trained by Hugging Face"), IM, {}),
    ("ChatML with a start token", "ChatML", "{{ bos_token }}" + chatml(), IM + S, {"bos": "<s>"}),
    ("Qwen3 without thoughts", "Qwen3", QWEN3_PLAIN, IM + THINK, {}),
    ("Qwen3", "Qwen3", QWEN3, IM + THINK, {}),
    ("Qwen3 thinking", "Qwen3", QWEN3_THINKING, IM + THINK, {}),
    ("SmolLM3", "SmolLM3", SMOLLM3, IM + THINK, {}),
    ("Llama 2", "Llama 2", LLAMA2, S, {"bos": "<s>", "eos": "</s>"}),
    ("Llama 3", "Llama 3", LLAMA3, HEADERS, {"bos": "<|begin_of_text|>"}),
    ("Llama 3.1", "Llama 3.1", LLAMA31, HEADERS, {"bos": "<|begin_of_text|>"}),
    ("Llama 3.2", "Llama 3.1", LLAMA32, HEADERS, {"bos": "<|begin_of_text|>"}),
    ("Mistral without system", "Mistral", MISTRAL_OLD, S, {"bos": "<s>", "eos": "</s>", "system": False}),
    ("Mistral V1", "Mistral", MISTRAL_V1, S, {"bos": "<s>", "eos": "</s>"}),
    ("Mistral V3", "Mistral", MISTRAL_V3, INST, {"bos": "<s>", "eos": "</s>"}),
    ("Mistral Tekken", "Mistral", TEKKEN, INST, {"bos": "<s>", "eos": "</s>"}),
    ("Mistral V7", "Mistral V7", MISTRAL_V7, INST, {"bos": "<s>", "eos": "</s>"}),
    ("Phi-3", "Phi-3", PHI3, PHI + ["<|endoftext|>"], {"rstrip": True, "eos": "<|endoftext|>"}),
    ("Phi-3 of the first release", "Phi-3", PHI3_FIRST, PHI + S, {"bos": "<s>", "system": False}),
    ("Phi-4-mini", "Phi-4-mini", PHI4_MINI, PHI + ["<|endoftext|>"], {"eos": "<|endoftext|>"}),
    ("Phi-4", "Phi-4", PHI4, IM + ["<|im_sep|>"], {}),
    ("Granite 3.0", "Granite", GRANITE30, ROLES, {}),
    ("Granite 3.1", "Granite", GRANITE31, ROLES, {}),
    ("Granite 3.3", "Granite", GRANITE33, ROLES, {}),
    ("Zephyr", "Zephyr", ZEPHYR, PHI[:3] + S, {"eos": "</s>"}),
]

CONVERSATIONS = [
    [("user", "Hello")],
    [("system", "Be brief."), ("user", "it's größer 12, 山 上?")],
    [("user", "  two spaces\n\n"), ("assistant", "\n ok then \n"), ("user", "\t1 2\n")],
    [("system", " You know  all. "), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d e"), ("user", "f")],
    [("user", "why"), ("assistant", "<think>\nhm\n</think>\n\nthat is so"), ("user", "😀 and now?")],
    [("system", "Quiet. /no_think"), ("user", "one"), ("assistant", "two"), ("user", "three")],
    [("system", "/system_override Only this. "), ("user", "one")],
    [("system", "/no_think"), ("user", "one")],
    # Nothing follows these.
    [("user", "why"), ("assistant", "<think>\nhm\n</think>\n\nthat is so")],
    [("user", "why"), ("assistant", "\nno reason")],
    [("system", "Be brief."), ("user", " a "), ("assistant", " b\n"), ("user", "c"), ("assistant", "\n d ")],
]


def tokenizer_of(markers, options):
    file = json.loads(TOKENIZER.read_text())
    known = {token["content"] for token in file["added_tokens"]}
    next_id = 1 + max([token["id"] for token in file["added_tokens"]] + list(file["model"]["vocab"].values()))
    for marker in markers:
        if marker not in known:
            file["added_tokens"].append({"id": next_id, "content": marker, "single_word": False, "lstrip": False,
                                         "rstrip": options.get("rstrip", False), "normalized": False, "special": marker not in THINK})
            next_id += 1
    return file


class Today(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return TODAY


def main():
    chat_template_utils.datetime = Today
    families = []
    for title, name, jinja, markers, options in FAMILIES:
        file = tokenizer_of(markers, options)
        bos, eos = options.get("bos", ""), options.get("eos", "")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(file)), chat_template=jinja,
                                            **({"bos_token": bos} if bos else {}), **({"eos_token": eos} if eos else {}))
        cases = []
        for conversation in CONVERSATIONS:
            if conversation[0][0] == "system" and not options.get("system", True):
                continue
            messages = [{"role": role, "content": content} for role, content in conversation]
            follows = conversation[-1][0] == "user"
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=follows)
            ids = tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=follows)
            cases.append({"messages": messages, "text": text, "ids": list(ids)})
        families.append({"title": title, "name": name, "jinja": jinja, "bos": bos, "eos": eos, "system": options.get("system", True),
                         "added_tokens": file["added_tokens"], "cases": cases})
    goldens = {"written_by": "scripts/make_chat_goldens.py", "transformers": transformers.__version__,
               "today": [TODAY.year, TODAY.month, TODAY.day], "families": families}
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    lines = json.dumps(goldens, ensure_ascii=True, separators=(",", ":"))
    OUTPUT.write_text(lines.replace('{"title"', '\n{"title"').replace('{"messages"', '\n{"messages"') + "\n")
    print(f"{len(families)} families, {sum(len(family['cases']) for family in families)} conversations, {OUTPUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
