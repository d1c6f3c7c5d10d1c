#!/usr/bin/env bash
# Guess:    A Keras model with LoRA that was saved and loaded can be trained on: it is the same model, and its LoRA is
#           still what trains.
# Versions: keras==3.15.1 numpy==2.4.6 torch==2.13.0 (as the backend of Keras), any build of torch, on a CPU
# Seen:     It gives the same outputs, its kernels are frozen and its LoRA factors are what trains. But both factors are
#           zero, so that each has a gradient of exactly zero: 200 epochs change the outputs by 0.0, with Adam and with
#           SGD, after load_model() and after load_weights(), for Dense, EinsumDense, Conv2D and Embedding. With one of
#           the factors drawn anew the same model learns. Saving merges the LoRA into the kernel, and loading empties
#           both factors, where a new LoRA has one that is not zero. Only an Adam whose own memory was loaded as well
#           gets away from there, by what is left of its momentum.
# Matters:  The second stage of a training runs through, shows a loss and saves a file, but was no training (of biases
#           at the most). Nor has the saved model a LoRA any more that could be taken off, weakened or applied elsewhere.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile torch==2.13.0 numpy==2.4.6 keras==3.15.1
cd "$folder"
KERAS_HOME="$folder" KERAS_BACKEND=torch OMP_NUM_THREADS=1 venv/bin/python -W ignore - <<'PY'
import keras
import numpy
import torch
from keras import layers


def check(what, value, low, high):
    print(f"{what}: {value:.6g}, expected {low:g} to {high:g}")
    if not low <= value <= high:
        raise SystemExit(f"CHANGED: {what}")


dice = numpy.random.default_rng(0)
numbers = dice.normal(size=(64, 5)).astype("float32")
words = dice.integers(0, 12, size=(64, 4))
pictures = dice.normal(size=(64, 6, 6, 2)).astype("float32")
goal = dice.normal(size=(64, 3)).astype("float32")

KINDS = {
    "Dense": (numbers, lambda: [layers.Dense(3, use_bias=False)]),
    "EinsumDense": (numbers, lambda: [layers.EinsumDense("ab,bc->ac", output_shape=3)]),
    "Conv2D": (pictures, lambda: [layers.Conv2D(3, 3, use_bias=False), layers.GlobalAveragePooling2D()]),
    "Embedding": (words, lambda: [layers.Embedding(12, 3), layers.GlobalAveragePooling1D()]),
}


def built(kind):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input(KINDS[kind][0].shape[1:]), *KINDS[kind][1]()])
    model.layers[0].enable_lora(2)
    return model


def learnt(model, data, optimizer):
    """Trains for 200 epochs; returns by how much the loss and the outputs change."""
    model.compile(optimizer, "mse")
    before, loss = model.predict(data, verbose=0), model.evaluate(data, goal, verbose=0)
    model.fit(data, goal, epochs=200, batch_size=64, verbose=0)
    change = numpy.abs(model.predict(data, verbose=0) - before).max()
    return abs(loss - model.evaluate(data, goal, verbose=0)) / loss, change


def factors(model):
    return [weight for weight in model.layers[0].weights if "lora" in weight.name]


for kind, (data, _) in KINDS.items():
    model = built(kind)
    loss, change = learnt(model, data, "adam")
    check(f"{kind}: a new LoRA trains, change of the loss", loss, 1e-3, 1)
    outputs = model.predict(data, verbose=0)
    model.save("model.keras")

    def loaded():
        return keras.models.load_model("model.keras", compile=False)

    def filled():
        other = built(kind)
        other.load_weights("model.keras")
        return other

    for optimizer in ("adam", "sgd"):
        for how, get in (("load_model", loaded), ("load_weights", filled)):
            what = f"{kind}, {how}, {optimizer}"
            model = get()
            layer = model.layers[0]
            check(f"{what}: outputs, off", numpy.abs(model.predict(data, verbose=0) - outputs).max(), 0, 1e-5)
            check(f"{what}: LoRA is enabled", layer.lora_enabled, 1, 1)
            trainable = {weight.name for weight in layer.trainable_weights}
            check(f"{what}: what trains is the two factors", trainable == {w.name for w in factors(model)}, 1, 1)
            check(f"{what}: largest number in them", max(abs(w.numpy()).max() for w in factors(model)), 0, 0)
            loss, change = learnt(model, data, optimizer)
            check(f"{what}: change of the loss", loss, 0, 0)
            check(f"{what}: change of the outputs", change, 0, 0)

    model = loaded()
    first = factors(model)[0]
    first.assign(keras.initializers.HeUniform(seed=3)(first.shape))
    change = numpy.abs(model.predict(data, verbose=0) - outputs).max()
    check(f"{kind}: one factor drawn anew, outputs, off", change, 0, 1e-5)
    check(f"{kind}: one factor drawn anew, change of the loss", learnt(model, data, "adam")[0], 1e-6, 1)

    model = keras.models.load_model("model.keras")  # with the optimizer and its memory
    model.fit(data, goal, epochs=20, batch_size=64, verbose=0)
    change = numpy.abs(model.predict(data, verbose=0) - outputs).max()
    check(f"{kind}: with Adam's memory loaded, change of the outputs", change, 1e-7, 10)

# and by hand, in float64 without Keras: x @ (kernel + a @ b) with a and b zero
kernel = torch.tensor(dice.normal(size=(5, 3)))
a, b = (torch.zeros(size, dtype=torch.float64, requires_grad=True) for size in ((5, 2), (2, 3)))
(torch.tensor(numbers).double() @ (kernel + a @ b) - torch.tensor(goal).double()).square().mean().backward()
check("by hand: gradients of two zero factors", max(a.grad.abs().max().item(), b.grad.abs().max().item()), 0, 0)
PY
