"""Pre-training of the embedded default base: a small SmolLM3 from scratch that calls tools and chats a little.

Takes rows of `training.data`; gives a plain transformers checkpoint (config, weights, tokenizer).
"""

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, SmolLM3Config, SmolLM3ForCausalLM
from transformers.utils import ModelOutput

from repo_package import ROOT

from .data import DEFAULT_DATA, PromptStyle, Row, RowStream
from .head_evaluation import evaluation_sets
from .trainer import BlockDataset, RunOptions, StageTrainer, Sums, world_size

logger = logging.getLogger(__name__)

CURRICULUM = (
    (0.15, (PromptStyle(max_tools=1, description_chars=0, max_prompt_tokens=256),)),
    (0.65, (PromptStyle(max_tools=2, description_chars=0, max_prompt_tokens=256),)),
    (1.00, (PromptStyle(), PromptStyle(max_tools=4, description_chars=160, max_prompt_tokens=512))),
)
"""(part of the run until which it holds, styles of the prompts). Short prompts first: they teach copying at half the
cost. Long descriptions last: without them the base answers tools described at length in words."""


def draw_style(rng: random.Random, progress: float) -> PromptStyle:
    """A prompt style of the curriculum at a point of the run in [0, 1)."""
    return rng.choice(next(styles for until, styles in CURRICULUM if progress < until))


@dataclass(frozen=True)
class BaseRun(RunOptions):
    """Options of one pre-training run; each is an argument of `train_hf.py --stage base`.

    Args:
        tokenizer: folder or repo of the tokenizer.
        init_from: folder or repo of a trained model or base to go on from; None = fresh weights with planted copying.
        hidden_size, intermediate_size, num_layers, num_heads, num_key_value_heads: size of a fresh base.
        curriculum_from: point of the curriculum in [0, 1) at which the run starts.
        warm_share: first part of the run on repeated random tokens, which sharpen the planted copying.
        prompt_share: part of the prompt positions that are predicted too.
        prompt_weight: loss weight of a predicted prompt position against one of the reply.
        follow_ups: most further requests on the tools of one row.
        talk_weight: multiplies the weights of the sources that want no call (refusals and chat).
        eval_rows: most rows of each evaluation set used while training; 0 = no evaluation.
    """

    max_steps: int = 1500
    rows_per_batch: int = 14
    eval_rows: int = 100
    tokenizer: str = str(ROOT)
    init_from: str | None = None
    hidden_size: int = 256
    intermediate_size: int = 704
    num_layers: int = 6
    num_heads: int = 8
    num_key_value_heads: int = 4
    curriculum_from: float = 0.0
    warm_share: float = 0.005
    prompt_share: float = 0.2
    prompt_weight: float = 0.5
    follow_ups: int = 6
    talk_weight: float = 1.0


def base_config(tokenizer: PreTrainedTokenizerFast, run: BaseRun) -> SmolLM3Config:
    """Default base: 6.5M parameters in SmolLM3's layout (grouped queries, tied embeddings, one layer without RoPE)."""
    return SmolLM3Config(
        vocab_size=len(tokenizer),
        hidden_size=run.hidden_size,
        intermediate_size=run.intermediate_size,
        num_hidden_layers=run.num_layers,
        num_attention_heads=run.num_heads,
        num_key_value_heads=run.num_key_value_heads,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@torch.no_grad()
def plant_induction(model: SmolLM3ForCausalLM, generator: torch.Generator, scale: float = 12.5) -> None:
    """Set four heads of two layers so that the fresh model already copies: what followed the last occurrence of this
    token?

    Copying values out of the prompt is most of a tool call, and finding it by gradient alone costs more tokens than a
    short CPU run sees. In layer 0 one head of each group looks at the previous position and writes that token's
    projection into the residual; in the first layer without RoPE one head of each group matches the current token
    with those projections and adds the embedding found there. All weights stay trainable.

    Args:
        model: a freshly initialised model with tied embeddings.
        generator: of the random projections.
        scale: growth of the embeddings over transformers' default.
    """
    # Blocks start silent (zero output matrices): random ones would drown what the planted heads write.
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    config = model.config
    width, groups = config.hidden_size, config.num_key_value_heads
    head = width // config.num_attention_heads
    per_group = config.num_attention_heads // groups
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    constant = basis[0]
    token = basis[1 : 1 + groups * head].view(groups, head, width)  # projections that stand for a token
    slot = torch.linalg.qr(torch.randn(width, groups * head, generator=generator)).Q.T.reshape(groups, head, width)
    # A direction shared by all embeddings acts as the bias that attention by position alone needs; it shifts all
    # logits alike.
    # Muon moves every matrix by its learning rate in spectral norm, AdamW every embedding entry by its own: planted
    # matrices and embeddings of order one survive that, small ones are gone after thirty steps. The small last norm
    # keeps the tied logits in range.
    embeddings = model.model.embed_tokens.weight
    embeddings.mul_(scale)
    model.model.norm.weight.fill_(2 / scale)
    embeddings.add_(0.5 * embeddings.norm(dim=1).mean() * constant)
    theta = config.rope_parameters["rope_theta"]
    pairs = head // 2
    frequency = theta ** (-torch.arange(pairs) / pairs)
    fast = (torch.arange(pairs) < 6).float()  # slow rotations cannot tell neighbours apart
    key = torch.cat([fast, torch.zeros(pairs)])
    query = torch.cat([fast * frequency.cos(), -fast * frequency.sin()])  # rotated back by one position
    first = model.model.layers[0].self_attn
    match = model.model.layers[config.no_rope_layers.index(0)].self_attn
    for group in range(groups):
        rows = slice(group * head, (group + 1) * head)
        heads = slice(group * per_group * head, (group * per_group + 1) * head)
        first.q_proj.weight[heads] = 1.2 * torch.outer(query, constant)
        first.k_proj.weight[rows] = 1.2 * torch.outer(key, constant)
        first.v_proj.weight[rows] = token[group]
        first.o_proj.weight[:, heads] = 0.03 * scale * slot[group].T
        match.q_proj.weight[heads] = 2.2 * token[group]
        match.k_proj.weight[rows] = 2.2 * slot[group]
        match.v_proj.weight[rows] = token[group]
        match.o_proj.weight[:, heads] = 0.15 * scale * token[group].T


@dataclass(frozen=True, eq=False)
class TokenRow:
    """One sequence and what of it is predicted.

    Args:
        ids: int64 [length].
        weights: float32 [length - 1], loss weight of predicting the token at position i + 1; 0 is not predicted.
        is_target: bool [length - 1], the predicted token belongs to a reply.
    """

    ids: Tensor
    weights: Tensor
    is_target: Tensor


def token_row(row: Row, rng: random.Random, prompt_share: float, prompt_weight: float) -> TokenRow:
    """The whole replies of a row and a random share of its prompt are predicted."""
    ids: list[int] = []
    weights: list[float] = []
    for context, reply in row.spans():
        ids += context + reply
        weights += [prompt_weight * (rng.random() < prompt_share) for _ in context]
        weights += [1.0] * len(reply)
    is_target = [False] * len(row.prompt_ids) + [True] * len(row.target_ids)
    for context, reply in row.follow_ups:
        is_target += [False] * len(context) + [True] * len(reply)
    return TokenRow(torch.tensor(ids), torch.tensor(weights[1:]), torch.tensor(is_target[1:]))


def repeated_tokens(vocab: int, length: int, rng: random.Random) -> TokenRow:
    """Random tokens that repeat with a random period: predictable from the second round on, by copying alone."""
    period = rng.randint(8, length // 2)
    word = [rng.randrange(vocab) for _ in range(period)]
    predictable = torch.arange(1, length) > period
    return TokenRow(torch.tensor((word * length)[:length]), predictable.float(), predictable)


def collate(rows: Sequence[TokenRow], pad_id: int) -> dict[str, Tensor]:
    """Pad rows on the right into the arguments of `BaseObjective`; causal attention never looks there."""

    def pad(tensors: list[Tensor], value: float) -> Tensor:
        return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    weights = pad([row.weights for row in rows], 0.0)
    return {
        "input_ids": pad([row.ids for row in rows], pad_id),
        "weights": weights,
        "is_target": pad([row.is_target for row in rows], False),
        "loss_normaliser": weights.sum(),
    }


@dataclass
class BaseOutput(ModelOutput):
    """Result of a training forward; everything but `loss` is detached.

    Args:
        loss: scalar, weighted cross-entropy over `loss_normaliser`.
        losses: float32 [predicted], cross-entropy of each predicted token.
        hits: bool [predicted], its best token is right.
        is_target: bool [predicted], it belongs to a reply.
    """

    loss: Tensor | None = None
    losses: Tensor | None = None
    hits: Tensor | None = None
    is_target: Tensor | None = None


class BaseObjective(nn.Module):
    """Next-token loss at chosen positions: logits of all positions would dominate the cost of so small a model.

    Args:
        model: the base.
    """

    def __init__(self, model: SmolLM3ForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, weights: Tensor, is_target: Tensor, loss_normaliser: Tensor) -> BaseOutput:
        """Run the base, and the vocabulary matrix where a prediction is wanted.

        Args:
            input_ids: int64 [rows, length].
            weights: float32 [rows, length - 1], as in `TokenRow`.
            is_target: bool [rows, length - 1].
            loss_normaliser: scalar that the summed loss is divided by.
        """
        hidden = self.model.model(input_ids=input_ids[:, :-1], use_cache=False).last_hidden_state
        chosen = weights > 0
        logits = self.model.lm_head(hidden[chosen]).float()
        labels = input_ids[:, 1:][chosen]
        losses = functional.cross_entropy(logits, labels, reduction="none")
        loss = (losses * weights[chosen]).sum() / loss_normaliser
        return BaseOutput(loss, losses.detach(), logits.detach().argmax(-1) == labels, is_target[chosen])


def metric_sums(output: BaseOutput) -> Sums:
    """Loss and accuracy of the reply tokens."""
    assert output.losses is not None
    assert output.hits is not None
    assert output.is_target is not None
    count = output.is_target.sum()
    return {
        "reply_loss": (output.losses[output.is_target].sum(), count),
        "reply_token_accuracy": (output.hits[output.is_target].sum(), count),
    }


@torch.no_grad()
def evaluate(objective: BaseObjective, rows: list[Row], pad_id: int) -> dict[str, float]:
    """Reply loss, token accuracy, decision accuracy and exact replies, with the gold reply as context.

    A reply whose every token is the most likely one is what greedy generation would write, so `exact` is the share of
    greedy replies that equal the gold one token for token.
    """
    device = next(objective.parameters()).device
    loss = correct = tokens = decisions = exact = 0.0
    for start in range(0, len(rows), 8):
        part = rows[start : start + 8]
        batch = collate([token_row(row, random.Random(0), 0.0, 0.0) for row in part], pad_id)
        output = objective(**{name: tensor.to(device) for name, tensor in batch.items()})
        loss, tokens = loss + float(output.losses.sum()), tokens + len(output.losses)
        correct += float(output.hits.sum())
        for row_hits in output.hits.split([len(row.target_ids) for row in part]):
            decisions, exact = decisions + float(row_hits[0]), exact + float(row_hits.all())
    count = max(len(rows), 1)
    per_token = {"loss": loss / max(tokens, 1), "token": correct / max(tokens, 1)}
    return per_token | {"decision": decisions / count, "exact": exact / count}


def start_weights(run: BaseRun, tokenizer: PreTrainedTokenizerFast) -> SmolLM3ForCausalLM:
    """The base to train: fresh with planted copying, or that of a trained model.

    Raises:
        ValueError: the vocabulary of the trained model is not the tokenizer's.
    """
    if run.init_from is None:
        torch.manual_seed(run.seed)
        model = SmolLM3ForCausalLM(base_config(tokenizer, run))
        plant_induction(model, torch.Generator().manual_seed(run.seed))
        return model
    loaded = AutoModelForCausalLM.from_pretrained(run.init_from, dtype=torch.float32, trust_remote_code=True)
    model = getattr(loaded, "base", loaded)
    if model.config.vocab_size != len(tokenizer):
        raise ValueError(
            f"{run.init_from} has a vocabulary of {model.config.vocab_size} tokens, the tokenizer {run.tokenizer} of "
            f"{len(tokenizer)}: pass the tokenizer that it was trained with."
        )
    return model.requires_grad_(True)


def training_set(run: BaseRun, tokenizer: PreTrainedTokenizerFast) -> tuple[RowStream, BlockDataset[TokenRow]]:
    """The stream of rows and the batches made of it, in the prompt style of the curriculum."""
    stream = RowStream(
        run.data or DEFAULT_DATA,
        tokenizer,
        follow_ups=run.follow_ups,
        talk_weight=run.talk_weight,
        leave_out=run.leave_out,
        on_error=run.on_error,
    )

    def draw(rng: random.Random, progress: float) -> TokenRow:
        if progress < run.warm_share:
            return repeated_tokens(len(tokenizer), 128, rng)
        # A run that goes on from trained weights has the first part of the curriculum behind it.
        style = draw_style(rng, run.curriculum_from + (1 - run.curriculum_from) * progress)
        return token_row(stream.draw(style, rng), rng, run.prompt_share, run.prompt_weight)

    def cost(row: TokenRow) -> float:
        return len(row.ids)

    batches = run.max_steps * run.gradient_accumulation_steps * world_size()
    return stream, BlockDataset(draw, cost, run.rows_per_batch, batches, run.seed)


def train_base(run: BaseRun, tokenizer: PreTrainedTokenizerFast) -> SmolLM3ForCausalLM:
    """Pre-train the base and save it in bfloat16, with config and tokenizer, under `output/final`.

    Args:
        run: the options.
        tokenizer: the model's tokenizer.

    Returns:
        The trained base in bfloat16.
    """
    objective = BaseObjective(start_weights(run, tokenizer))
    stream, dataset = training_set(run, tokenizer)
    sets = evaluation_sets(run.data or [DEFAULT_DATA], tokenizer, run.eval_rows)

    def measure() -> dict[str, float]:
        pad_id = tokenizer.pad_token_id
        found = {name: evaluate(objective, rows, pad_id) for name, rows in sets.items()}
        return {f"{name}_{key}": value for name, scores in found.items() for key, value in scores.items()}

    trainer = StageTrainer(
        objective,
        run,
        dataset,
        lambda rows: collate(rows, tokenizer.pad_token_id),
        evaluate=measure if sets else None,
        # The first set, which are tools of the training data: those of `dev/` choose nothing unless they are alone.
        best_metric=f"-{next(iter(sets), '')}_loss",
        metric_sums=metric_sums,
    )
    trainer.run()
    final = run.output / "final"
    if trainer.args.should_save:
        objective.model.to(torch.bfloat16).save_pretrained(final)
        tokenizer.save_pretrained(final)
        logger.info("base saved to %s; rows left out: %s", final, dict(stream.skipped))
    return objective.model
