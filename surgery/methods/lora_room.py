"""LoraRoom: a LoRA of the largest rank, whose scaling is a tensor; the rest of A and B of a smaller one is zero."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from surgery.core.method import Method, Params, Run
from surgery.core.op import Op
from surgery.core.room import Room
from surgery.core.site import Site
from surgery.core.spec import Spec
from surgery.errors import MatchError, ShapeError
from surgery.methods.lora import Lora


def room_for(method: Method, rank: int, site: Site) -> Room | None:
    """Room for others like it, of any rank up to `rank`; None where there can be none.

    None, too, over a weight that its module reads by itself: there the adapter's numbers are constants.
    """
    op = site.acting
    if not isinstance(method, Lora) or op.roles or op.groups > 1:
        return None
    return LoraRoom(replace(method, r=rank, scaling=1.0, start=True))


@dataclass(frozen=True)
class LoraRoom(Room):
    """What is beyond an adapter's rank has no gradient: training leaves it zero."""

    whole: Lora

    def tensors(self, site: Site) -> Mapping[str, Spec]:
        return {**self.whole.tensors(site), "s": Spec("lora_scaling", (), fixed=True)}

    def laid(self, method: Method, p: Params, where: str) -> Params:
        if not isinstance(method, Lora):
            raise MatchError(
                f"{where}: it is {method.name}, and the room is for LoRA; delete that adapter and load this"
            )
        if method.r > self.whole.r:
            raise ShapeError(
                f"{where}: r is {method.r}, and there is room for {self.whole.r}; call "
                f"enable_peft_hotswap(target_rank={method.r}) before the first adapter is loaded"
            )
        A, B = p["A"], p["B"]
        wide_A = A.new_zeros(self.whole.r, *A.shape[1:])
        wide_B = B.new_zeros(B.shape[0], self.whole.r, *B.shape[2:])
        wide_A[: method.r], wide_B[:, : method.r] = A, B
        # As whole numbers, for a model that goes to another dtype takes all floating point tensors along.
        scaling = torch.tensor(method.scaling, dtype=torch.float64).view(torch.int64)
        return {"A": wide_A, "B": wide_B, "s": scaling}

    def own(self, method: Method, held: Params) -> Params:
        assert isinstance(method, Lora)
        return {"A": held["A"][: method.r], "B": held["B"][:, : method.r]}

    def branch(self, x: Tensor, run: Run, op: Op, held: Params, training: bool) -> Tensor:
        scaling = held["s"].view(torch.float64)
        return self.whole.branch(x, run, op, {"A": held["A"], "B": held["B"] * scaling}, training)
