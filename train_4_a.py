"""Cosine annealing: the baseline with a learning rate that decays along a cosine to zero.

Differs from train.py only in the scheduler.

    python train_4_a.py

Writes best_train_4_a.pt, last_train_4_a.pt, plots/train_4_a_*.png and results/train_4_a_seed*.csv and .json.
Mean IoU on CamVid: val 0.4672 ± 0.0136, test 0.3736 ± 0.0034 (3 seeds, 48 epochs, CPU, PyTorch 2.14; REPORT.md).
"""

import torch

import util
import voc
from basic_fcn import FCN
from seg import cli, engine


def main():
    args = cli.arguments(__file__, __doc__, epochs=48, batch_size=4)
    util.seed_everything(args.seed)

    augment = None
    train, val, test = voc.loaders(args, size=224, augment=augment)

    model = FCN(len(train.classes)).to(args.device)

    weight = None
    criterion = torch.nn.CrossEntropyLoss(weight, ignore_index=util.VOID)

    # The classifier starts with logits near zero and needs a higher learning rate than the layers below.
    layers = {"params": model.layers.parameters(), "lr": 5e-4}
    classifier = {"params": model.classifier.parameters(), "lr": 1e-2}
    optimizer = torch.optim.Adam([layers, classifier], fused=True)

    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs)

    engine.fit(args, model, train, val, test, criterion=criterion, optimizer=optimizer, scheduler=scheduler)


if __name__ == "__main__":
    cli.run(main)
