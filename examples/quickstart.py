"""Train a small ReLU² GPT on Python's own sources, watch its activations grow sparse, and run its FFNs in 2:4.

Takes about two minutes on two CPU cores. There 2:4 runs in emulation: the numbers are exact, the speed says nothing.
"""

import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import ao_act24

DIM, LAYERS, HEADS, CONTEXT, BATCH, STEPS = 128, 4, 4, 128, 8, 300


class FFN(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(DIM, 4 * DIM, bias=False), nn.Linear(4 * DIM, DIM, bias=False)

    def forward(self, x):
        return self.down(F.relu(self.up(x)).square())  # what 2:4 is for


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm_1, self.norm_2, self.ffn = nn.RMSNorm(DIM), nn.RMSNorm(DIM), FFN()
        self.qkv, self.proj = nn.Linear(DIM, 3 * DIM, bias=False), nn.Linear(DIM, DIM, bias=False)

    def forward(self, x):
        q, k, v = self.qkv(self.norm_1(x)).unflatten(-1, (3, HEADS, DIM // HEADS)).permute(2, 0, 3, 1, 4)
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attention.transpose(1, 2).flatten(-2))
        return x + self.ffn(self.norm_2(x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.position = nn.Embedding(256, DIM), nn.Embedding(CONTEXT, DIM)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.RMSNorm(DIM), nn.Linear(DIM, 256, bias=False)

    def forward(self, tokens):
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def batches(text, count, size=BATCH):
    """Random windows of the text and the bytes that follow them."""
    for _ in range(count):
        starts = torch.randint(len(text) - CONTEXT, (size,))
        window = torch.stack([text[start : start + CONTEXT + 1] for start in starts]).long()
        yield window[:, :-1].to(device), window[:, 1:].to(device)


torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
text = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in sources)), dtype=torch.uint8)
train, held_out = text[: int(0.9 * len(text))], text[int(0.9 * len(text)) :]
test_x, test_y = next(batches(held_out, 1, size=32))

model = GPT().to(device)
config = ao_act24.Act24Config(emulate=device != "cpu")  # on a GPU: fp32 and training have no kernels
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)


def held_out_loss(logits):
    return F.cross_entropy(logits.flatten(0, 1), test_y.flatten())


print(f"1. Train densely on {len(sources)} files of Python's standard library, {len(train) / 1e6:.1f} MB of bytes")
for step, (x, y) in enumerate(batches(train, STEPS + 1)):
    if step % 100 == 0:
        layers = (result := ao_act24.measure(model, test_x, loss=held_out_loss)).layers
        zeros = " ".join(f"{layer.zeros:.0%}" for layer in layers)
        print(f"step {step:3}: held-out loss {result.dense_loss:.3f}, zeros in relu(h)² by layer {zeros}")
    loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

print("\n2. Look first: what would be rewritten, and one FFN's graph before and after")
print(ao_act24.explain(model, test_x, config=config))
with torch.no_grad():  # in training it is one operator, relu2_ffn
    x = torch.randn(BATCH, CONTEXT, DIM, device=device)
    graphs = ao_act24.capture_graphs(model.blocks[0].ffn, x, config=config)
print(graphs.before[0], graphs.after[0], sep="\n\n")

print("\n3. Compile: one line, training and inference alike")
compiled = torch.compile(model, backend="ao_act24", options={"act24": config})
with torch.no_grad():
    dense, sparse = held_out_loss(model(test_x)), held_out_loss(compiled(test_x))
print(f"held-out loss dense {dense:.4f}, compiled in 2:4 {sparse:.4f}")
schedule = ao_act24.Schedule(warmup_steps=0)  # a new model needs dense steps first: this one has had them
for x, y in batches(train, 20):
    loss = F.cross_entropy(compiled(x).flatten(0, 1), y.flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
with torch.no_grad():
    print(f"held-out loss after 20 training steps in 2:4, backward included: {held_out_loss(compiled(test_x)):.4f}")

print("\n4. What does 2:4 cost this model?")
result = ao_act24.measure(model, test_x, loss=held_out_loss)
print(result)
result.plot("quickstart.png")
print("wrote quickstart.png")
