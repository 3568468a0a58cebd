"""The training step of the traced rank: whole model, or the stages of a pipeline rank."""

from collections.abc import Callable
from typing import Any

import torch
from meters import Collectives
from titan import Built
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class
from torch.distributed.pipelining.stage import InferenceMode
from torch.distributed.tensor import DTensor, Replicate, Shard
from torchtitan.components.loss import cross_entropy_loss

Step = Callable[[], None]


class Run:
    """A model on fake tensors with its optimizer and inputs; ``step`` is one training step."""

    def __init__(self, built: Built, case: dict[str, Any], counter: Collectives) -> None:
        self.parts, self.parameters = built.parts, built.parameters
        for part in built.parts:
            part.to_empty(device="cpu")
            tie_again(part)
            part.train()
        self.optimizer = torch.optim.AdamW(
            [parameter for part in built.parts for parameter in part.parameters()],
            lr=1e-4, foreach=case["optimizer"] == "foreach",
        )  # fmt: skip
        shape = (case["layout"]["microbatch_size"], case["sequence"] // case["layout"]["cp"])
        tokens, labels = torch.randint(0, built.vocab, shape), torch.randint(0, built.vocab, shape)
        self.inputs = (tokens, labels)
        maker = whole_model if case["layout"]["pp"] == 1 else pipeline_rank
        self.step = maker(built, case, self.optimizer, counter, tokens, labels)


def tie_again(part: torch.nn.Module) -> None:
    """Point the embedding at the head's weight, as ``Decoder.init_states`` does once the model is
    sharded: tensor parallelism gives each module a parameter of its own."""
    if part.enable_weight_tying:
        part.tok_embeddings.weight = part.lm_head.weight


def whole_model(
    built: Built, case: dict[str, Any], optimizer: torch.optim.Optimizer, counter: Collectives,
    tokens: torch.Tensor, labels: torch.Tensor,
) -> Step:  # fmt: skip
    """Forward, loss and backward of each microbatch, then the optimizer."""
    model, chunked = built.parts[0], case["loss"] == "chunked"
    loss_fn = built.trainer.loss.build(compile_config=built.trainer.compile) if chunked else None
    if chunked:
        loss_fn.set_lm_head(model.lm_head)
        model._skip_lm_head = True
    extra = _positions(case, tokens)
    valid = torch.tensor(float(tokens.numel())) if chunked else None

    def step() -> None:
        for _ in range(case["microbatches"]):
            counter.phase = "forward"
            out = model(tokens, **extra)
            if chunked:
                loss = loss_fn(out, labels, valid)
                loss = loss[0] if isinstance(loss, tuple) else loss
            else:
                loss = cross_entropy_loss(out, labels)
            del out
            counter.phase = "backward"
            if loss.requires_grad:
                loss.backward()
            del loss
        counter.phase = "update"
        optimizer.step()
        optimizer.zero_grad()

    return step


SCHEDULES = {
    "gpipe": "GPipe", "1f1b": "1F1B", "interleaved": "Interleaved1F1B", "looped_bfs": "LoopedBFS",
    "interleaved_zero_bubble": "InterleavedZeroBubble", "zbv": "ZBVZeroBubble",
    "dualpipev": "DualPipeV",
}  # fmt: skip
ON_A_V = ("zbv", "dualpipev")


def pipeline_rank(
    built: Built, case: dict[str, Any], optimizer: torch.optim.Optimizer, counter: Collectives,
    tokens: torch.Tensor, labels: torch.Tensor,
) -> Step:  # fmt: skip
    """PyTorch's own schedule on one rank; the fake group sends and receives nothing."""
    layout = case["layout"]
    pp, count = layout["pp"], len(built.parts)
    group = built.dims.get_mesh("pp").get_group()
    hidden, logits = _boundaries(built, case, tokens)
    stages = []
    for index, part in enumerate(built.parts):
        number, last = index * pp + case["stage"], pp * count - 1
        if index and layout["schedule"] in ON_A_V:
            number = last - case["stage"]
        enters, leaves = number > 0, number < last
        stages.append(
            PipelineStage(
                part, number, pp * count, torch.device("cpu"), group=group,
                input_args=(hidden if enters else tokens.to("meta"),),
                output_args=(hidden if leaves else logits,),
                input_grads=(hidden.detach(),) if enters else None,
                output_grads=(hidden.detach(),) if leaves else None,
            )
        )  # fmt: skip
    kind = get_schedule_class(SCHEDULES[layout["schedule"]])
    schedule = kind(
        stages if count > 1 else stages[0],
        n_microbatches=case["microbatches"], loss_fn=cross_entropy_loss, scale_grads=False,
    )  # fmt: skip
    # Stages agree by messages whether to infer shapes; no neighbour answers here, shapes are given.
    schedule._warmup_p2p = lambda *_: [
        setattr(stage, "_inference_mode", InferenceMode.STATIC) for stage in stages
    ]
    batch = tokens.repeat(case["microbatches"], 1)
    targets = labels.repeat(case["microbatches"], 1)
    first, last = stages[0].is_first, any(stage.is_last for stage in stages)

    def step() -> None:
        counter.phase = "pipeline"
        losses: list[torch.Tensor] | None = [] if last else None
        schedule.step(
            *([batch] if first else []), target=targets if last else None, losses=losses,
            return_outputs=False,
        )  # fmt: skip
        counter.phase = "update"
        optimizer.step()
        optimizer.zero_grad()

    return step


def _boundaries(
    built: Built, case: dict[str, Any], tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What enters and leaves a stage, and the logits, as shapes: sharded tensors under tp."""
    batch, length = tokens.shape
    layout = case["layout"]
    if layout["tp"] == 1:
        hidden = torch.empty(batch, length, built.hidden, dtype=torch.bfloat16, device="meta")
        logits = torch.empty(batch, length, built.vocab, dtype=torch.bfloat16, device="meta")
        return hidden.requires_grad_(), logits.requires_grad_()
    mesh = built.dims.get_mesh("tp")
    place = [Shard(1)] if layout["sequence_parallel"] else [Replicate()]

    def sharded(width: int, placements: list[Any]) -> torch.Tensor:
        whole = torch.empty(batch, length, width, dtype=torch.bfloat16, device="meta")
        local = list(whole.shape)
        if isinstance(placements[0], Shard):
            local[placements[0].dim] //= layout["tp"]
        piece = torch.empty(local, dtype=torch.bfloat16, device="meta")
        return DTensor.from_local(
            piece, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
        ).requires_grad_()

    return sharded(built.hidden, place), sharded(built.vocab, [Shard(2)])


def _positions(case: dict[str, Any], tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    if case["layout"]["cp"] == 1:
        return {}
    return {"positions": torch.arange(tokens.shape[1]).unsqueeze(0).expand(tokens.shape[0], -1)}
