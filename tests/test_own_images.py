"fastai's own loaders and networks, as one's own images come: from files to a saved network"
from PIL import Image
import numpy as np, pytest, torch
from fastai.vision.all import (CategoryBlock, DataBlock, ImageBlock, Learner, Normalize, RandomSplitter, Resize,
                               get_image_files, parent_label, resnet18, vision_learner)
from adverfine.all import PGD, AutoAttack, load_compressed
from adverfine.evaluation.report import robustness_page

@pytest.fixture(scope='module')
def dls(tmp_path_factory):
    "Photographs of three kinds and many sizes, in colour"
    folder,rng = tmp_path_factory.mktemp('photographs'),np.random.default_rng(0)
    for kind,colour in enumerate(('blue', 'green', 'red')):
        (folder/colour).mkdir()
        for k in range(16):
            image = rng.integers(0, 160, (20+k%5, 24+k%3, 3), dtype='uint8')
            image[..., kind] += 90
            Image.fromarray(image).save(folder/colour/f'{k}.png')
    block = DataBlock(blocks=(ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label,
                      splitter=RandomSplitter(.4, seed=0), item_tfms=Resize(24),
                      batch_tfms=Normalize.from_stats([.4, .5, .4], [.2, .2, .3]))
    return block.dataloaders(folder, bs=16)

def test_a_vision_learner_goes_all_the_way(dls, tmp_path):
    def dense(): return vision_learner(dls, resnet18, pretrained=False, normalize=False).model
    learn = Learner(dls, dense())
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(2, 3e-3)
        learn.prune(.5).quantize(8)
        learn.adversarial_fine_tune(1, 4/255)
    report = learn.robustness([PGD(4/255, steps=3), AutoAttack(4/255, version='adaptive')])
    assert (report.data, report.split)==('', 'valid') and 'valid' in str(report)
    assert '<html' in robustness_page(report, 'small') and report._repr_html_()
    learn.save_compressed(tmp_path/'small', factory=dense, report=report)
    again = load_compressed(tmp_path/'small', factory=dense)
    x = torch.rand(4, 3, 24, 24)
    mean,std = (torch.tensor(o).view(3, 1, 1) for o in ([.4, .5, .4], [.2, .2, .3]))
    with torch.no_grad(): assert torch.equal(again(x), learn.model.eval()((x-mean)/std))
