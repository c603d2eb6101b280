"""Chat templates as Jinja source: ours, ChatML, Llama 2 and Llama 3 by name, others in files."""

from rlhfjax import json_text, paths
from rlhfjax.errors import DataError
from rlhfjax.paths import Path

OURS = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# OpenAI's chat markup as in Qwen2 and SmolLM2, without their default system prompts.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Touvron et al. 2023 (Llama 2), appendix A.3.3 and the release's `chat_completion`.
LLAMA2 = (
    "{% if messages and messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set turns = messages %}{% set system = '' %}{% endif %}"
    "{% for message in turns %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('the roles must alternate user/assistant/user/assistant') }}"
    "{% endif %}"
    "{% set content = (system if loop.first else '') + message['content'] %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# The model card of Llama 3 ("Prompt format").
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
BUILT_IN = {"ours": OURS, "chatml": CHATML, "llama2": LLAMA2, "llama3": LLAMA3}
# Texts that must be special tokens; as ordinary text, a message could write them.
MARKERS = {
    OURS: ("<|user|>", "<|assistant|>", "<|system|>"),
    CHATML: ("<|im_start|>", "<|im_end|>"),
    LLAMA3: ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}


def read_template(path: Path) -> str:
    """Returns the source in a file, such as chat_template.jinja.

    Raises:
      DataError: there is no such file, or it is not UTF-8 text, or empty.
    """
    content = paths.read(path)
    if other := json_text.other_format(content):
        raise DataError(f"{path}: it is {other}; expected Jinja source in UTF-8")
    try:
        source = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: invalid UTF-8 at byte {error.start}; expected Jinja source"
        ) from None
    if not source.strip():
        raise DataError(f"{path}: it is empty; expected Jinja source")
    return source
