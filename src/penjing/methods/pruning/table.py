"""Pruning: weights, neurons, heads, channels and blocks that go."""

from __future__ import annotations

from penjing.methods.base import Method, Selection
from penjing.methods.pruning import (
    alps,
    angular_layers,
    channels,
    cut,
    gradual,
    greedy_layers,
    layer_cut,
    loraprune,
    lottery_ticket,
    magnitude,
    movement,
    named_blocks,
    replaceme,
    shortgpt,
    sparsegpt,
    taylor,
    vocabulary,
    wanda,
)
from penjing.methods.pruning.options import RefitOptions, caution, needs_of_mask
from penjing.methods.pruning.scheduled import everywhere
from penjing.methods.pruning.unit_scores import SCORES
from penjing.methods.training import Trained
from penjing.statistics import ColumnNorm, CosineChange, Gram

TABLE: tuple[Method, ...] = (
    Method(
        name="magnitude",
        summary="remove the smallest weights; no calibration",
        paper="arXiv:1506.02626",
        options=magnitude.MagnitudeOptions,
        linear=magnitude.linear,
        needs=needs_of_mask,
        caution=caution,
        row_wise=lambda options: options.scope == "row" or options.pattern is not None,
    ),
    Method(
        name="wanda",
        summary="remove weights that are small and see small inputs",
        paper="arXiv:2306.11695",
        options=RefitOptions,
        linear=wanda.linear,
        needs=lambda options: needs_of_mask(options, ColumnNorm),
        caution=caution,
    ),
    Method(
        name="sparsegpt",
        summary="remove weights column by column, the remaining ones make up for it; can quantise in the same pass",
        paper="arXiv:2301.00774",
        options=sparsegpt.SparseGPTOptions,
        linear=sparsegpt.linear,
        needs=lambda options: (Gram,),
        caution=caution,
        row_wise=lambda options: options.pattern is not None and not (options.bits and options.group_size == "tensor"),
    ),
    Method(
        name="alps",
        summary="choose mask and weights together by splitting the problem (ADMM), then solve for the weights",
        paper="arXiv:2406.07831",
        options=alps.ALPSOptions,
        linear=alps.linear,
        needs=lambda options: (Gram,),
        caution=caution,
        row_wise=lambda options: options.pattern is not None,
    ),
    Method(
        name="taylor",
        summary="remove the weights without which the loss would change least, by gradients on a few texts",
        paper="arXiv:1611.06440",
        options=taylor.TaylorOptions,
        remake=taylor.WEIGHT_PRUNING,
        caution=caution,
    ),
    Method(
        name="shortgpt",
        summary="remove the decoder blocks that change the hidden state least",
        paper="arXiv:2403.03853",
        options=shortgpt.ShortGPTOptions,
        select=Selection(CosineChange, shortgpt.select),
    ),
    Method(
        name="angular-layers",
        summary="remove the run of neighbouring blocks that turns the hidden state least",
        paper="arXiv:2403.17887",
        options=angular_layers.RunOptions,
        remake=layer_cut.ANGULAR,
    ),
    Method(
        name="greedy-layers",
        summary="remove block after block, each time the one whose absence the model's outputs show least",
        paper="arXiv:2402.09025",
        options=greedy_layers.GreedyOptions,
        remake=layer_cut.GREEDY,
    ),
    Method(
        name="replaceme",
        summary="remove a run of blocks and fold the linear map nearest to it into the MLP before it",
        paper="arXiv:2505.02819",
        options=replaceme.ReplaceMeOptions,
        remake=layer_cut.REPLACEME,
    ),
    Method(
        name="named-blocks",
        summary="remove the blocks that a list names, as a search or an allocation found them",
        paper="arXiv:2410.14649",
        options=named_blocks.NamedOptions,
        remake=layer_cut.NAMED,
    ),
    Method(
        name="neurons",
        summary="remove neurons of the MLP; the projection after them makes up for it",
        paper="arXiv:2501.17771",
        options=cut.NeuronOptions,
        remake=cut.unit_cut(cut.scored, refit=lambda options: options.refit),
    ),
    Method(
        name="heads",
        summary="remove groups of attention heads; the projection after them makes up for it",
        paper="arXiv:1905.10650",
        options=cut.HeadOptions,
        remake=cut.unit_cut(cut.scored, refit=lambda options: options.refit),
    ),
    Method(
        name="channels",
        summary="remove channels of the residual stream, turned so that the last matter least, or as they are",
        paper="arXiv:2401.15024",
        options=channels.ChannelOptions,
        remake=channels.STREAM_CUT,
    ),
    Method(
        name="flap",
        summary="remove heads and neurons that hardly fluctuate, and put their mean into a bias",
        paper="arXiv:2312.11983",
        options=cut.FLAPOptions,
        remake=cut.unit_cut(lambda options: SCORES["fluctuation"], refit=lambda options: False, biased=True),
    ),
    Method(
        name="llm-pruner",
        summary="remove coupled heads and neurons without which the loss would change least, by gradients",
        paper="arXiv:2305.11627",
        options=cut.LLMPrunerOptions,
        remake=cut.unit_cut(cut.llm_pruner_score, refit=lambda options: options.refit),
    ),
    Method(
        name="loraprune",
        summary="train low-rank changes, and remove the heads and neurons that their gradients find unimportant",
        paper="arXiv:2305.18403",
        options=loraprune.LoRAPruneOptions,
        remake=loraprune.LORAPRUNE,
    ),
    Method(
        name="gradual",
        summary="train, and remove a few more of the smallest weights every few steps, on a cubic schedule",
        paper="arXiv:1710.01878",
        options=gradual.GradualOptions,
        remake=Trained(start=gradual.train, prunes=everywhere),
    ),
    Method(
        name="movement",
        summary="train, and remove the weights that training draws towards zero, on a cubic schedule",
        paper="arXiv:2005.07683",
        options=movement.MovementOptions,
        remake=Trained(start=movement.train, prunes=everywhere),
    ),
    Method(
        name="lottery-ticket",
        summary="train, prune, go back to early weights, train again; with the controls that make it an experiment",
        paper="arXiv:1803.03635",
        options=lottery_ticket.LotteryOptions,
        remake=Trained(start=lottery_ticket.train, prunes=everywhere),
    ),
    Method(
        name="trim-vocabulary",
        summary="leave tokens that a use never meets out of an encoder's embedding and of its tokenizer",
        paper="arXiv:2010.05609",
        options=vocabulary.VocabularyOptions,
        reads="encoder",
        remake=vocabulary.VocabularyCut(
            config=lambda config, layout, options: options.config(config, layout), keeps_zeros=lambda options: True
        ),
    ),
)
