#!/usr/bin/env python3
"""Writes a tiny model that a real llama.cpp server loads: tiny_model.py OUT.gguf [--layers N]

It always says the same sentence, whatever it is asked, at every temperature. Nothing is
downloaded or trained: the weights are a table of "after this token comes that one".

How that works. All attention and feed-forward weights are zero, so each layer passes its
input on. A token's embedding has a single 1 in it, which the final norm scales by the
square root of the width. The output matrix therefore is the table: its column for a token
is what the model thinks of every next token.

The server's part stays real: tokenising, batching, the KV cache, sampling, and the grammars
behind `response_format` and `tool_choice`. Layers add only work, that is, slowness.
"""

import argparse
import array
import math
import re
import struct

SENTENCE = "The gateway forwards each request to a healthy backend and streams the answer back."

WIDTH = 512  # also the bound of the vocabulary: every token owns one dimension
HEAD = 64
FEED_FORWARD = 64
CONTEXT = 65_536

END_OF_TEXT, TURN, END_OF_TURN = CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOOL_CALL = "<tool_call>"

# ChatML; tools in the form of the Hermes models, which llama.cpp recognises and gives a grammar.
CHAT_TEMPLATE = """\
{%- if tools %}
{{- '<|im_start|>system\\n# Tools\\n\\nYou may call one or more of these functions:\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
{{- '\\n</tools>\\n\\nTo call one, answer with a JSON object in XML tags:\\n' }}
{{- '<tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call>' }}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content %}{{- message.content }}{%- endif %}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


def byte_alphabet():
    """Returns GPT-2's printable character for each of the 256 bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    names = {byte: chr(byte) for byte in printable}
    names.update((byte, chr(256 + place)) for place, byte in enumerate(others))
    return names


def tokenizer():
    """Returns the vocabulary, the merges, and the sentence as tokens.

    Each word of the sentence becomes one token, by merges that add one letter at a time to
    its beginning. All but the first begin with a space, so no merge competes with another.
    """
    alphabet = byte_alphabet()
    spelled = [
        "".join(alphabet[byte] for byte in word.encode())
        for word in re.findall(r" ?[A-Za-z]+|[^A-Za-z]", SENTENCE)
    ]
    merges = dict.fromkeys(
        (word[:end], word[end]) for word in spelled for end in range(1, len(word))
    )
    vocabulary = [alphabet[byte] for byte in range(256)]
    vocabulary += ["".join(pair) for pair in merges] + CONTROL + [TOOL_CALL]
    return vocabulary, list(merges), spelled


def next_token_table(vocabulary, spelled):
    """Returns how much each token (row) wants each next token (column).

    The steps are so large that no temperature changes the order.
    """
    assert len(set(spelled)) == len(spelled), "each word needs exactly one successor"
    first, last = spelled[0], spelled[-1]
    wishes = {word: [following] for word, following in zip(spelled, spelled[1:])}
    # A tool call follows the sentence only where a grammar insists on one. Its tags stand on
    # lines of their own; no second call follows.
    newline = byte_alphabet()[ord("\n")]
    wishes[last] = [END_OF_TURN, TOOL_CALL]
    wishes[TOOL_CALL] = [newline]
    wishes["}"] = [END_OF_TURN, "}", "]", newline]
    # Every free string of a JSON answer is "z".
    wishes['"'] = ["z"]
    wishes["z"] = ['"']
    # Where a grammar forbids all that, the first of these that it allows comes next: end if
    # the JSON is complete, else close what is open, else open something.
    fallbacks = [END_OF_TURN, *'"}]<,:{[1t']

    table = []
    for token in vocabulary:
        order = list(dict.fromkeys(wishes.get(token, [first]) + fallbacks))
        row = [0.0] * len(vocabulary)
        for place, following in enumerate(order):
            row[vocabulary.index(following)] = 12.0 * (len(order) - place)
        table.append(row)
    return table


# GGUF's numbers for the types of values that are written here.
U32, F32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9
I32 = 5


def gguf_string(text):
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def gguf_value(kind, value):
    if kind == STRING:
        return gguf_string(value)
    return struct.pack({U32: "<I", I32: "<i", F32: "<f", BOOL: "<?"}[kind], value)


def gguf_entry(key, kind, value):
    """Returns one key and its value; a list makes an array of that kind."""
    head = gguf_string(key)
    if isinstance(value, list):
        head += struct.pack("<IIQ", ARRAY, kind, len(value))
        return head + b"".join(gguf_value(kind, item) for item in value)
    return head + struct.pack("<I", kind) + gguf_value(kind, value)


def write_gguf(path, entries, tensors):
    """Writes a GGUF file, version 3; a tensor is a name, its shape (fastest first) and 32-bit floats."""
    aligned = lambda size: -size % 32
    with open(path, "wb") as out:
        out.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries)))
        for entry in entries:
            out.write(gguf_entry(*entry))
        offset = 0
        for name, shape, data in tensors:
            assert len(data) == math.prod(shape), name
            out.write(gguf_string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape))
            out.write(struct.pack("<IQ", 0, offset))
            size = 4 * len(data)
            offset += size + aligned(size)
        out.write(b"\0" * aligned(out.tell()))
        for _, _, data in tensors:
            out.write(data.tobytes())
            out.write(b"\0" * aligned(4 * len(data)))


def build(path, layers):
    vocabulary, merges, spelled = tokenizer()
    size = len(vocabulary)
    assert size <= WIDTH, f"vocabulary of {size} does not fit"
    id_of = vocabulary.index

    embedding = array.array("f", bytes(4 * size * WIDTH))
    output = array.array("f", bytes(4 * size * WIDTH))
    scale = 1 / math.sqrt(WIDTH)
    for token, row in enumerate(next_token_table(vocabulary, spelled)):
        embedding[token * WIDTH + token] = 1.0
        for following, wanted in enumerate(row):
            output[following * WIDTH + token] = wanted * scale

    zeros = lambda *shape: (shape, array.array("f", bytes(4 * math.prod(shape))))
    tensors = [
        ("token_embd.weight", (WIDTH, size), embedding),
        ("output_norm.weight", (WIDTH,), array.array("f", [1.0] * WIDTH)),
        ("output.weight", (WIDTH, size), output),
    ]
    for layer in range(layers):
        for name, *shape in [
            ("attn_norm", WIDTH),
            ("attn_q", WIDTH, WIDTH),
            ("attn_k", WIDTH, HEAD),
            ("attn_v", WIDTH, HEAD),
            ("attn_output", WIDTH, WIDTH),
            ("ffn_norm", WIDTH),
            ("ffn_gate", WIDTH, FEED_FORWARD),
            ("ffn_up", WIDTH, FEED_FORWARD),
            ("ffn_down", FEED_FORWARD, WIDTH),
        ]:
            tensors.append((f"blk.{layer}.{name}.weight", *zeros(*shape)))

    kind_of = lambda token: 3 if token in CONTROL else 4 if token == TOOL_CALL else 1
    entries = [
        ("general.architecture", STRING, "llama"),
        ("general.name", STRING, "tiny"),
        ("general.file_type", U32, 0),
        ("llama.context_length", U32, CONTEXT),
        ("llama.embedding_length", U32, WIDTH),
        ("llama.block_count", U32, layers),
        ("llama.feed_forward_length", U32, FEED_FORWARD),
        ("llama.attention.head_count", U32, WIDTH // HEAD),
        ("llama.attention.head_count_kv", U32, 1),
        ("llama.attention.layer_norm_rms_epsilon", F32, 1e-5),
        ("llama.rope.dimension_count", U32, HEAD),
        ("llama.vocab_size", U32, size),
        ("tokenizer.ggml.model", STRING, "gpt2"),
        ("tokenizer.ggml.pre", STRING, "gpt-2"),
        ("tokenizer.ggml.tokens", STRING, vocabulary),
        ("tokenizer.ggml.token_type", I32, [kind_of(token) for token in vocabulary]),
        ("tokenizer.ggml.merges", STRING, [" ".join(pair) for pair in merges]),
        ("tokenizer.ggml.bos_token_id", U32, id_of(END_OF_TEXT)),
        ("tokenizer.ggml.eos_token_id", U32, id_of(END_OF_TURN)),
        ("tokenizer.ggml.padding_token_id", U32, id_of(END_OF_TEXT)),
        ("tokenizer.ggml.add_bos_token", BOOL, False),
        ("tokenizer.chat_template", STRING, CHAT_TEMPLATE),
    ]
    write_gguf(path, entries, tensors)


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("out")
    arguments.add_argument("--layers", type=int, default=4)
    given = arguments.parse_args()
    build(given.out, given.layers)


if __name__ == "__main__":
    main()
