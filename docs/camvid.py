"""Draw docs/camvid.jpg: four photos of CamVid's val, their ground truth and the predictions of checkpoints.

    PYTHONPATH=. python docs/camvid.py data/VOCdevkit/CamVid best_train.pt best_train_5_a.pt best_train_6.pt
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

import predict
import voc
from seg import checkpoint, plotting

data, *paths = sys.argv[1:]
split, names = voc.Split(data, "val"), [Path(path).stem.removeprefix("best_") + ".py" for path in paths]
models, samples = [checkpoint.load(path) for path in paths], []
for index in range(12, len(split), len(split) // 4):
    photo, truth = split.photo(index), split.mask(index)
    samples.append(("photo", np.asarray(photo), truth, *(predict.segment(model, photo) for model in models)))
path = Path(__file__).with_name("camvid.jpg")
plotting.predictions(path, "", split.classes, samples, names)  # as PNG
picture = Image.open(path).convert("RGB")
picture.thumbnail((1000, 1000))
picture.save(path, quality=85)
