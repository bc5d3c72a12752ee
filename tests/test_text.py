"""Tokenizers and chat templates of Hugging Face folders, and text that comes in parts."""

import json

import pytest

from jaxmoe.checkpoint import CheckpointError
from jaxmoe.models import ByteText, TextStream, Tokenizer

TEMPLATE = """\
{%- if messages[0].role == "tool" %}{{ raise_exception("no tools") }}{% endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == "skip" %}{% continue %}{% endif %}
{{ message.role }}:{{ message.content | tojson }}{{ eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "assistant:" }}{% endif %}"""


def write_tokenizer(folder, vocab_size=400, template=None):
    """A byte-level tokenizer with <s> (0) and </s> (1); a folder as on the hub."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs the text extra")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())[: vocab_size - 2]
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_text_goes_to_tokens_and_back(tmp_path):
    text = Tokenizer(write_tokenizer(tmp_path / "m"))
    tokens = text.encode("né €")
    assert tokens[0] == 0
    assert len(tokens) == 1 + len("né €".encode())
    assert text.decode(tokens) == "né €"
    assert text.stop == {1}
    assert not text.has_chat_template


def test_stop_tokens_are_collected(tmp_path):
    folder = write_tokenizer(tmp_path / "m")
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    (folder / "config.json").write_text('{"text_config": {"eos_token_id": 5}}')
    assert Tokenizer(folder).stop == {1, 5, 7, 9}


def test_documents_start_after_a_token(tmp_path):
    folder = write_tokenizer(tmp_path / "m")
    text = Tokenizer(folder)
    assert text.start == 0
    assert text.encode_document("né".encode()) == text.encode("né")[1:]
    (folder / "tokenizer_config.json").write_text("{}")
    assert Tokenizer(folder).start is None
    (folder / "config.json").write_text('{"text_config": {"eos_token_id": [5, 6]}}')
    assert Tokenizer(folder).start == 5
    (folder / "generation_config.json").write_text('{"bos_token_id": 4, "eos_token_id": 9}')
    assert Tokenizer(folder).start == 4
    assert (ByteText().start, ByteText().encode_document("né".encode())) == (0, [110, 195, 169])


@pytest.mark.parametrize("place", ["config", "list", "file"])
def test_chat_template(tmp_path, place):
    pytest.importorskip("jinja2", reason="needs the text extra")
    given = {
        "config": TEMPLATE,
        "list": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}],
        "file": "wrong",
    }[place]
    folder = write_tokenizer(tmp_path / "m", template=given)
    if place == "file":
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    text = Tokenizer(folder)
    messages = [{"role": role, "content": 'a"ü'} for role in ("user", "skip")]
    tokens = text.encode_chat(messages)
    assert text.decode(tokens) == 'user:"a\\"ü"assistant:'  # without <s> and </s>
    assert tokens[0] == 0
    assert tokens.count(0) == tokens.count(1) == 1
    with pytest.raises(ValueError, match="refuses the messages: no tools"):
        text.encode_chat([{"role": "tool", "content": ""}])


def test_templates_cannot_reach_python(tmp_path):
    pytest.importorskip("jinja2", reason="needs the text extra")
    template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    text = Tokenizer(write_tokenizer(tmp_path / "m", template=template))
    with pytest.raises(ValueError, match="cannot be rendered: access to attribute"):
        text.encode_chat([])


def test_folders_without_text_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: missing"):
        Tokenizer(tmp_path)
    folder = write_tokenizer(tmp_path / "m")
    with pytest.raises(ValueError, match="has no chat template"):
        Tokenizer(folder).encode_chat([])
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is no tokenizer"):
        Tokenizer(folder)


def test_a_stream_shows_whole_characters():
    stream = TextStream(ByteText())
    data = "a€ü".encode() + b"\xff" + "b€".encode()
    parts = [stream.push([byte]) for byte in data[:-1]]
    assert parts == ["a", "", "", "€", "", "ü", "", "\ufffdb", "", ""]
    assert stream.end() == "\ufffd"


def test_a_stream_of_a_tokenizer(tmp_path):
    text = Tokenizer(write_tokenizer(tmp_path / "m"))
    stream = TextStream(text)
    tokens = text.encode("nein, €5!")
    assert "".join(map(stream.push, ([t] for t in tokens))) + stream.end() == "nein, €5!"
