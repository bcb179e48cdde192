"""Text encoders of a few hundred parameters, each with a tokenizer that knows single characters.

Both are of the classes that the pipelines name, so that a saved pipeline loads without being told anything.
"""

import string

from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    LlamaConfig,
    LlamaModel,
    LlamaTokenizerFast,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from small_pipelines.entry import randomised

WIDTH = 32  # of every encoder's hidden states
CHARACTERS = string.ascii_letters + string.digits + string.punctuation

Pair = tuple[PreTrainedModel, PreTrainedTokenizerBase]

# A decoder of any of the Llama-like families.
_DECODER = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}

# Without what the system says: Flux2's pipeline begins with sentences that would leave a short prompt no room.
_CHAT = (
    "{% for message in messages if message.role != 'system' %}<{{ message.role }}>"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}"
)


def t5(seed: int, length: int = 16, width: int = WIDTH, multilingual: bool = False) -> Pair:
    """T5's encoder, or UMT5's."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *CHARACTERS]
    scores = [(piece, 0.0 if place < 3 else -2.0) for place, piece in enumerate(pieces)]
    tokenizer = T5TokenizerFast(vocab=scores, extra_ids=0, model_max_length=length)
    config, model = (UMT5Config, UMT5EncoderModel) if multilingual else (T5Config, T5EncoderModel)
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return randomised(model(config(vocab_size=len(pieces), feed_forward_proj="gated-gelu", **sizes)), seed), tokenizer


def clip(seed: int, length: int = 16, projection: bool = False) -> Pair:
    """CLIP's text model, with or without the projection of what it pools."""
    pieces = [*CHARACTERS, *(f"{piece}</w>" for piece in CHARACTERS), "<|startoftext|>", "<|endoftext|>"]
    ends = {"bos_token_id": len(pieces) - 2, "eos_token_id": len(pieces) - 1, "pad_token_id": len(pieces) - 1}
    tokenizer = CLIPTokenizer(vocab=_numbered(pieces), merges=[], model_max_length=length)
    config = CLIPTextConfig(
        vocab_size=len(pieces),
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=WIDTH,
        max_position_embeddings=length,
        **ends,
    )
    return randomised((CLIPTextModelWithProjection if projection else CLIPTextModel)(config), seed), tokenizer


def bert(seed: int, length: int = 77) -> Pair:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *CHARACTERS, *(f"##{piece}" for piece in CHARACTERS)]
    tokenizer = BertTokenizer(vocab=_numbered(pieces), model_max_length=length)
    config = BertConfig(
        vocab_size=len(pieces),
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=length,
    )
    return randomised(BertModel(config), seed), tokenizer


def gemma(seed: int) -> Pair:
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *CHARACTERS]
    tokenizer = GemmaTokenizer(vocab=_numbered(pieces), merges=[], padding_side="right")
    config = Gemma2Config(vocab_size=len(pieces), num_hidden_layers=2, query_pre_attn_scalar=16, **_DECODER)
    return randomised(Gemma2Model(config), seed), tokenizer


def llama(seed: int) -> Pair:
    pieces = ["<unk>", "<s>", "</s>", "<pad>", "▁", *CHARACTERS]
    tokenizer = LlamaTokenizerFast(vocab=_numbered(pieces), merges=[], pad_token="<pad>", padding_side="right")
    # The pipeline that has it takes the states two layers before the last.
    config = LlamaConfig(vocab_size=len(pieces), num_hidden_layers=3, pad_token_id=3, **_DECODER)
    return randomised(LlamaModel(config), seed), tokenizer


def qwen3(seed: int) -> Pair:
    tokenizer = _qwen_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer), num_hidden_layers=2, pad_token_id=tokenizer.pad_token_id, **_DECODER
    )
    return randomised(Qwen3Model(config), seed), tokenizer


def qwen_vl(seed: int) -> Pair:
    tokenizer = _qwen_tokenizer()
    text = {
        **_DECODER,
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 2,
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    }
    vision = {
        "depth": 1,
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "fullatt_block_indexes": [0],
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return randomised(Qwen2_5_VLForConditionalGeneration(config), seed), tokenizer


def mistral(seed: int) -> Pair:
    # The pipeline asks its processor for nothing but the chat's tokens, which a tokenizer gives as well.
    tokenizer = _qwen_tokenizer()
    text = {"model_type": "mistral", "vocab_size": len(tokenizer), "num_hidden_layers": 2, **_DECODER}
    vision = {
        "model_type": "pixtral",
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 16,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=0)
    return randomised(Mistral3ForConditionalGeneration(config), seed), tokenizer


def _qwen_tokenizer() -> Qwen2Tokenizer:
    pieces = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return Qwen2Tokenizer(vocab=_numbered(pieces), merges=[], chat_template=_CHAT)


def _numbered(pieces: list[str]) -> dict[str, int]:
    return {piece: number for number, piece in enumerate(pieces)}
