"""Three copies: an epoch shows each photo three times unchanged, as many steps without the variety.

Differs from train_4_b.py only in the augmentation.

    PYTHONPATH=. python benchmarks/ablation/copies.py
"""

import torch

import util
import voc
from basic_fcn import FCN
from seg import cli, engine, transforms


def main():
    args = cli.arguments(__file__, __doc__, epochs=48, batch_size=4)
    util.seed_everything(args.seed)

    augment = transforms.Augmentation(unchanged=3, augmented=0)
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
