"""Bad input: a ValueError that names the value, the rule and the remedy."""

import re

import pytest
import torch

from dpo_fast.functional import HeadLoRA, fused_linear_dpo, linear_logprobs, sequence_logprobs
from tests.functional.cases import SigmoidLoss, borders, make_case

W = torch.zeros(7, 4)
X = torch.zeros(5, 4)
Y = torch.zeros(5, dtype=torch.int64)

LINEAR = {
    "hidden is 3-d": (dict(hidden=torch.zeros(1, 5, 4)), r"hidden is \[1, 5, 4\].*\[N, H\]"),
    "hidden of integers": (dict(hidden=Y.reshape(5, 1)), r"hidden is .*int64.*floating"),
    "weight transposed": (dict(weight=W.T), r"weight is \[4, 7\] and hidden \[5, 4\].*same H"),
    "no vocabulary": (dict(weight=torch.zeros(0, 4)), r"V >= 1"),
    "dtypes differ": (dict(weight=W.double()), r"float64 and hidden torch.float32.*autocast"),
    "bias of the wrong length": (dict(bias=torch.zeros(4)), r"bias is \[4\].*\[V=7\]"),
    "bias dtype": (dict(bias=torch.zeros(7).half()), r"bias has dtype torch.float16"),
    "target too short": (dict(target=Y[:4]), r"target is \[4\].*N=5"),
    "target of int32": (dict(target=Y.int()), r"int32.*int64"),
    "target out of range": (dict(target=Y + 7), r"target\[0\] = 7.*\[0, 7\).*ignore_index"),
    "target negative": (dict(target=Y - 1), r"target\[0\] = -1"),
    "default ignore index only": (dict(target=Y - 100, ignore_index=-1), r"target\[0\] = -100"),
    "softcap": (dict(softcap=0.0), r"softcap=0.0 must be positive.*None"),
    "softcap NaN": (dict(softcap=float("nan")), r"softcap=nan"),
    "temperature": (dict(temperature=-1.0), r"temperature=-1.0 must be positive"),
    "logit_scale": (dict(logit_scale=0.0), r"logit_scale=0.0 must be positive"),
    "negative logit_scale": (dict(logit_scale=-2.0), r"logit_scale=-2.0 must be positive"),
    "mode": (dict(mode="fast"), r"mode='fast' is unknown.*'min-memory'"),
    "workspace": (dict(workspace=-1), r"workspace=-1"),
    "outputs as a string": (dict(outputs="entropy"), r"\('entropy',\)"),
    "unknown output": (dict(outputs=("entropies",)), r"\['entropies'\] unknown.*is_top1"),
    "group": (dict(group=object()), r"group=.*pass group=None"),
    "backend": (dict(backend="cuda"), r"backend='cuda' is unknown.*'chunked'"),
    "lora.a": (dict(lora=HeadLoRA(torch.zeros(2, 3), torch.zeros(7, 2), 1.0)), r"\[r, H=4\]"),
    "lora.b": (dict(lora=HeadLoRA(torch.zeros(2, 4), torch.zeros(7, 3), 1.0)), r"\[V=7, r\]"),
    "lora dtype": (
        dict(lora=HeadLoRA(torch.zeros(2, 4).half(), torch.zeros(7, 2).half(), 1.0)),
        r"lora.a has dtype torch.float16",
    ),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_logprobs(name):
    change, message = LINEAR[name]
    arguments = dict(hidden=X, weight=W, target=Y) | change
    with pytest.raises(ValueError, match=message):
        linear_logprobs(**arguments)


SEQUENCES = {
    "not from 0": (torch.tensor([1, 5]), r"cu_seqlens=\[1, 5\] must start at 0"),
    "not to N": (torch.tensor([0, 4]), r"end at N=5"),
    "a step back": (torch.tensor([0, 4, 3, 5]), r"never decrease"),
    "int32": (torch.tensor([0, 5], dtype=torch.int32), r"int32.*\[S \+ 1\] int64"),
    "empty": (torch.empty(0, dtype=torch.int64), r"cu_seqlens is \[0\]"),
    "two dimensions": (torch.tensor([[0, 5]]), r"cu_seqlens is \[1, 2\]"),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_borders_of_sequences(name):
    cu, message = SEQUENCES[name]
    with pytest.raises(ValueError, match=message):
        sequence_logprobs(X, W, Y, cu)
    with pytest.raises(ValueError, match=message):
        fused_linear_dpo(X, W, Y, cu, ref_logps=torch.zeros(2), loss=SigmoidLoss())


def test_token_weight():
    with pytest.raises(ValueError, match=r"token_weight is \[4\].*N=5"):
        sequence_logprobs(X, W, Y, torch.tensor([0, 5]), token_weight=torch.zeros(4))


def wrong_tuple(*_):
    return torch.zeros(2)


def wrong_length(chosen, *_):
    return chosen[:1], chosen, chosen


SCALE = torch.ones((), requires_grad=True)


def trainable(chosen, rejected, ref_chosen, ref_rejected):
    value = (chosen - rejected) * SCALE
    return value, chosen.detach(), rejected.detach()


CU = torch.tensor([0, 1, 2, 4, 5])
FUSED = {
    "odd number of sequences": (dict(cu_seqlens=torch.tensor([0, 2, 4, 5])), r"3 sequences.*even"),
    "seq_lens too short": (dict(seq_lens=[1, 1, 2]), r"seq_lens has 3 entries.*4 sequences"),
    "seq_lens with another sum": (dict(seq_lens=[1, 1, 2, 2]), r"end at N=5"),
    "pair_weight": (dict(pair_weight=torch.ones(4)), r"pair_weight is \[4\].*\[2\]"),
    "ref_logps of pairs": (dict(ref_logps=torch.zeros(2)), r"ref_logps is \[2\].*\[4\]"),
    "two references": (dict(ref_hidden=X), r"ref_hidden and ref_logps both"),
    "a weight without states": (dict(ref_weight=W), r"ref_weight.*ref_hidden"),
    "ref rows": (dict(ref_logps=None, ref_hidden=X[:4]), r"ref_hidden has 4 rows.*same N tokens"),
    "ref width": (
        dict(ref_logps=None, ref_hidden=torch.zeros(5, 3)),
        r"ref_weight is \[7, 4\] and ref_hidden \[5, 3\]",
    ),
    "ref dtype": (dict(ref_logps=None, ref_hidden=X.double()), r"ref_weight has dtype"),
    "loss returns a tensor": (dict(loss=wrong_tuple), r"wrong_tuple.*Tensor.*P=2"),
    "loss of another length": (dict(loss=wrong_length), r"wrong_length.*\[1\].*P=2"),
    "loss that is no function": (dict(loss="sigmoid"), r"loss='sigmoid'.*build_loss"),
}


@pytest.mark.parametrize("name", FUSED)
def test_fused_linear_dpo(name):
    change, message = FUSED[name]
    arguments = dict(
        policy_hidden=X,
        weight=W,
        target=Y,
        cu_seqlens=CU,
        ref_logps=torch.zeros(4),
        loss=SigmoidLoss(),
    )
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        fused_linear_dpo(**(arguments | change))


def test_a_loss_with_parameters_of_its_own_is_refused_not_starved():
    case = make_case(37)
    with pytest.raises(ValueError, match=r"trainable tensor of shape \[\].*sequence_logprobs"):
        fused_linear_dpo(
            case.hidden,
            case.weight,
            case.target,
            borders(),
            ref_logps=torch.zeros(10),
            loss=trainable,
        )
    with torch.no_grad():  # in evaluation nothing is starved
        fused_linear_dpo(
            case.hidden,
            case.weight,
            case.target,
            borders(),
            ref_logps=torch.zeros(10),
            loss=trainable,
        )
