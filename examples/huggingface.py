"""A Hugging Face model in 2:4: look, rewrite, generate, and check the tokens against a model written by hand.

Nemotron's feed-forward blocks are Linear → ReLU² → Linear. The weights here are random, so the text is noise, and the
activations have half their entries positive, where a trained model has a few percent: 2:4 drops far more here than it
would there. That the tokens agree says that the rewrite computes what it should, whatever the weights.
"""

import copy

import torch
from transformers import NemotronConfig, NemotronForCausalLM

import ao_act24


class Relu2In24(torch.nn.Module):
    """ReLU² that keeps the two largest of every four neighbours: what the sparse operators compute, stored dense."""

    def forward(self, h):
        groups = torch.relu(h).unflatten(-1, (-1, 4))
        order = groups.argsort(dim=-1, descending=True, stable=True)  # stable: of equal ones the first is kept
        kept = torch.zeros_like(groups).scatter(-1, order[..., :2], 1.0)
        return (groups.square() * kept).flatten(-2)


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # The CPU always runs the exact reference. A GPU without a 2:4 kernel stays dense unless asked to emulate.
    config = ao_act24.Act24Config(emulate=device == "cuda")

    torch.manual_seed(0)
    shape = NemotronConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.3,  # large, so that the feed-forward blocks matter at once
        eos_token_id=None,
        pad_token_id=0,
    )
    model = NemotronForCausalLM(shape).to(device).eval()
    ids = torch.randint(1, 512, (1, 16), device=device)

    # 1. Look first: which blocks would run in 2:4, and why the others would not. Nothing is changed.
    print(ao_act24.explain(model, ids, config=config, use_cache=False))

    # 2. What would it cost? The same input dense and in 2:4, layer by layer, and at the loss.
    print(ao_act24.measure(model, ids, labels=ids, use_cache=False))

    # 3. A reference to compare with: the same model with its activation replaced.
    reference = copy.deepcopy(model)
    for layer in reference.model.layers:
        layer.mlp.act_fn = Relu2In24()

    def generate(model):
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :].tolist()

    # 4. Rewrite. sparsify_ works in place and needs no compiler, which suits a short run; for a long one take
    #    torch.compile(model, backend="ao_act24"), or model.compile(backend="ao_act24") for generate.
    dense_tokens = generate(model)
    ao_act24.sparsify_(model, config)
    tokens = generate(model)
    print("dense    ", *dense_tokens)
    print("2:4      ", *tokens)
    print("reference", *generate(reference))
    assert tokens == generate(reference)
    print("The tokens of the rewritten model are those of its reference.")


if __name__ == "__main__":
    main()
