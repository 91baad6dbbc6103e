"""Weighted loss: rare classes weigh more in the cross-entropy, so that frequent ones do not dominate it.

Differs from train_4_b.py only in the weights of the classes in the loss.

    python train_4_c.py

Writes best_train_4_c.pt, last_train_4_c.pt, plots/train_4_c_*.png and results/train_4_c_seed*.csv and .json.
Mean IoU on CamVid: val 0.5945 ± 0.0028, test 0.4938 ± 0.0091 (3 seeds, 48 epochs, CPU, PyTorch 2.14; REPORT.md).
"""

import torch

import util
import voc
from basic_fcn import FCN
from seg import cli, engine, transforms


def main():
    args = cli.arguments(__file__, __doc__, epochs=48, batch_size=4)
    util.seed_everything(args.seed)

    augment = transforms.Augmentation(flip=0.5, degrees=15, scale=(0.5, 1.1), unchanged=1, augmented=2)
    train, val, test = voc.loaders(args, size=224, augment=augment)

    model = FCN(len(train.classes)).to(args.device)

    weight = voc.class_weights(train.split).sqrt().to(args.device)
    criterion = torch.nn.CrossEntropyLoss(weight, ignore_index=util.VOID)

    # The classifier starts with logits near zero and needs a higher learning rate than the layers below.
    layers = {"params": model.layers.parameters(), "lr": 5e-4}
    classifier = {"params": model.classifier.parameters(), "lr": 1e-2}
    optimizer = torch.optim.Adam([layers, classifier], fused=True)

    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs)

    engine.fit(args, model, train, val, test, criterion=criterion, optimizer=optimizer, scheduler=scheduler)


if __name__ == "__main__":
    cli.run(main)
