"""Tiny random Marian translators in Hugging Face layout."""

from __future__ import annotations

import json
from pathlib import Path

CORPUS = [
    "houses near a long river",
    "green fields near an airport",
    "many white boats and a harbour",
    "des maisons au bord de la rivière",
    "many green trees are around a playground",
    "campos verdes y un aeropuerto",
]


def make_marian(folder: Path, *, languages: tuple[str, ...], seed: int) -> Path:
    """A model with a vocabulary of a few words; ``languages`` are the codes it can be told to translate into."""
    import sentencepiece
    import torch
    from transformers import MarianConfig, MarianMTModel, MarianTokenizer

    folder.mkdir(parents=True)
    prefix = folder / "pieces"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4),
        model_prefix=str(prefix),
        vocab_size=80,
        hard_vocab_limit=False,
        character_coverage=1.0,
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")
    words = [pieces.id_to_piece(index) for index in range(pieces.get_piece_size())]
    vocabulary = dict.fromkeys(["</s>", "<unk>", *(f">>{code}<<" for code in languages), *words, "<pad>"])
    vocabulary.pop("<s>")
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(vocabulary)}))
    for name in ("source.spm", "target.spm"):
        (folder / name).write_bytes(prefix.with_suffix(".model").read_bytes())
    tokenizer = MarianTokenizer(
        str(folder / "source.spm"), str(folder / "target.spm"), str(folder / "vocab.json"), model_max_length=512
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    pad = tokenizer.pad_token_id
    config = MarianConfig(
        vocab_size=len(vocabulary),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=512,
        init_std=0.4,  # with the usual 0.02 every sentence would come out alike
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=pad,
        forced_eos_token_id=tokenizer.eos_token_id,
    )
    model = MarianMTModel(config).eval()
    with torch.no_grad():  # the sentence must matter more than the last word written
        for layer in model.model.decoder.layers:
            layer.encoder_attn.v_proj.weight *= 4
            layer.encoder_attn.out_proj.weight *= 4
    model.generation_config.bad_words_ids = [[pad]]
    model.save_pretrained(folder)
    return folder
