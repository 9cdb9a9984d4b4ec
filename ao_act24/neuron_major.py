"""``neuron_major_``: down projections stored with a row for each neuron, so that few tokens can leave out rows."""

from importlib.util import find_spec

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torchao.quantization.quantize_.common import KernelPreference

from ao_act24.fp8 import is_fp8, why_not_by_rows
from ao_act24.passes.find import Site, find_sites
from ao_act24.passes.vocabulary import known_weight
from ao_act24.trace import may_hold_ffn, trace
from ao_act24.transform import is_sparsified
from ao_act24.when import most_few_tokens


@torch.no_grad()
def neuron_major_(model: nn.Module) -> int:
    """Lay the weights of the down projections of Linear→ReLU²→Linear blocks in memory as ``[H, D]``, in place.

    Parameters, shapes, values and ``state_dict`` stay; only strides change, and loading a ``state_dict`` keeps them
    (but with ``assign=True``). Then ``torch.compile(model, backend="ao_act24")`` runs few tokens, in inference, by the
    rows of the neurons that fire alone. Many tokens run in 2:4 all the same; training on a GPU runs dense. Call it
    before an optimizer, ``sparsify_``, FSDP or DDP is given the model: they may count on strides.

    ``state_dict`` has them so, too: ``torch.save`` keeps it, safetensors' ``save_file`` refuses it (give it
    ``contiguous()`` ones; ``save_pretrained`` does), and ``from_pretrained`` makes rows of outputs: call it again.

    So are the weights of ``quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))``. But in
    fp8 tensor cores multiply rows of outputs only: many tokens then run dense, and torchao copies the weight at each
    call. That is for models, or copies of them, that only decode. Those of sizes at which no number of tokens runs by
    neurons (``ao_act24.when``) stay as they are; where MSLK is installed, all but of ``KernelPreference.TORCH``.

    Args:
        model: the model, or a part of it. Blocks that ``torch.fx`` cannot trace alone stay as they are, and so do
            weights that are an up projection's, too.

    Returns:
        The number of weights that are stored so.

    Raises:
        TypeError: if ``model`` is not a module.
        ValueError: if it was given to ``sparsify_`` already.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    model = getattr(model, "_orig_mod", model)
    if any(map(is_sparsified, model.modules())):
        raise ValueError(
            "model must not be given to sparsify_ yet: call neuron_major_ first, or unsparsify_ (fp8 weights stay fp8)"
        )
    traced = [trace(module, False) for module in model.modules() if may_hold_ffn(module)]
    sites = [site for each in traced if each for site in find_sites(each.graph)]
    ups = {id(known_weight(site.up)[0]) for site in sites if site.up}
    found: set[int] = set()
    for site in sites:
        if site.reason or site.down is None:
            continue
        weight, transposed = known_weight(site.down)
        if id(weight) in ups:
            continue
        if is_fp8(weight):
            if _takes_fp8(site):
                weight.qdata = weight.qdata.t().contiguous().t()
                found.add(id(weight))
        elif isinstance(weight, nn.Parameter) and not is_traceable_wrapper_subclass(weight):
            found.add(id(weight))
            with torch.inference_mode(weight.is_inference()):  # else the parameter could not be used as before
                weight.data = weight.data.contiguous() if transposed else weight.data.t().contiguous().t()
    return len(found)


def _takes_fp8(site: Site) -> bool:
    """Whether some number of tokens of a site whose second weight is in fp8 can run by neurons."""
    assert site.down is not None
    if site.up is None or site.up.transposed:
        return False
    (up, up_transposed), (down, transposed) = known_weight(site.up), known_weight(site.down)
    if transposed or up_transposed or not is_fp8(up) or why_not_by_rows(up) or why_not_by_rows(down):
        return False
    if find_spec("mslk") and down.kernel_preference != KernelPreference.TORCH:  # its kernels take rows of outputs only
        return False
    out_dim, hidden_dim = down.shape
    return most_few_tokens(up.shape[1], hidden_dim, out_dim, True) > 0
