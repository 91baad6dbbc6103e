"""No average: val is evaluated with the weights of the last step.

Differs from train_6.py only in the decay of the average.

    PYTHONPATH=. python benchmarks/ablation/without_average.py
"""

import torch
from torchvision.models import ResNet18_Weights

import util
import voc
from resnet_unet import AveragedResNetUNet
from seg import checkpoint, cli, engine, transforms


def main():
    args = cli.arguments(__file__, __doc__, epochs=40, batch_size=8, pretrained=True)
    util.seed_everything(args.seed)

    augment = transforms.Augmentation(flip=0.5, scale=(0.7, 1.1), brightness=0.3, contrast=0.3, saturation=0.3)
    size = (352, 480)  # landscape photos nearly keep their shape, and thin objects are wider than at 224
    train, val, test = voc.loaders(args, size=size, augment=augment)

    weights = ResNet18_Weights.IMAGENET1K_V1 if args.pretrained else None
    checkpoint.download(weights)
    model = AveragedResNetUNet(len(train.classes), weights, decay=0.0).to(args.device)

    weight = voc.class_weights(train.split).sqrt().to(args.device)
    criterion = torch.nn.CrossEntropyLoss(weight, ignore_index=util.VOID)

    # The backbone has learned from a million photos, and is to forget little of it; its batch norm is trained too.
    backbone = {"params": model.network.backbone.parameters(), "lr": 2e-4}
    decoder = {"params": [*model.network.decoder.parameters(), *model.network.classifier.parameters()], "lr": 1e-3}
    optimizer = torch.optim.AdamW([backbone, decoder], weight_decay=1e-2, fused=True)
    optimizer.register_step_post_hook(model.update)

    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs)

    engine.fit(args, model, train, val, test, criterion=criterion, optimizer=optimizer, scheduler=scheduler)


if __name__ == "__main__":
    cli.run(main)
