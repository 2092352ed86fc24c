"Where data sets are looked for, what is said of missing and damaged ones"
import gzip, os, pickle, struct
import numpy as np, pytest, torch
from PIL import Image
from adverfine.data.images import image_dls
from adverfine.data.folders import folder_dls
from adverfine.data.sources import cifar10_dls, cifar_vocab, digits_dls, fashion_mnist_dls
import fastai.callback.progress  # noqa: F401 verbs of a Learner

def _idx(a): return b'\0\0\x08' + bytes([a.ndim]) + struct.pack(f'>{a.ndim}I', *a.shape) + a.tobytes()

@pytest.fixture
def fashion(tmp_path):
    rng = np.random.default_rng(0)
    for part,n in (('train', 40), ('t10k', 20)):
        (tmp_path/f'{part}-images-idx3-ubyte').write_bytes(_idx(rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)))
        (tmp_path/f'{part}-labels-idx1-ubyte.gz').write_bytes(gzip.compress(_idx(np.arange(n, dtype=np.uint8)%10)))
    return tmp_path

def test_fashion_from_a_folder(fashion):
    dls = fashion_mnist_dls(fashion, bs=8)
    assert [len(dl.dataset) for dl in dls]==[36, 4, 20] and {dl.dataset.name for dl in dls}=={'Fashion-MNIST'}
    x,y = dls.one_batch()
    assert x.shape==(8, 1, 28, 28) and 0<=x.min() and x.max()<=1 and len(dls.vocab)==dls.c==10

@pytest.mark.parametrize('name,content,why', [
    ('train-images-idx3-ubyte', lambda b: b[:-7], 'were promised'),
    ('t10k-images-idx3-ubyte', lambda b: b'', 'no idx header'),
    ('t10k-labels-idx1-ubyte.gz', lambda b: b[:-9], 'end-of-stream|damaged'),
    ('train-labels-idx1-ubyte.gz', lambda b: b'not gzip at all', 'damaged'),
    ('train-labels-idx1-ubyte.gz', lambda b: gzip.compress(_idx(np.full(40, 10, np.uint8))),
     'labels run from 10 to 10'),
    ('train-labels-idx1-ubyte.gz', lambda b: gzip.compress(_idx(np.zeros((40, 1), np.uint8))), '1 axes expected'),
    ('train-labels-idx1-ubyte.gz', lambda b: gzip.compress(_idx(np.zeros(39, np.uint8))), '40 images but 39 labels')])
def test_fashion_damaged(fashion, name, content, why):
    f = fashion/name
    f.write_bytes(content(f.read_bytes()))
    with pytest.raises(ValueError, match=why) as e: fashion_mnist_dls(fashion)
    if 'labels' not in why: assert name in str(e.value)

def test_missing_says_where_and_how(tmp_path, monkeypatch):
    monkeypatch.setenv('FASTAI_HOME', str(tmp_path))
    for f,how in ((fashion_mnist_dls, 'apt-get install'), (cifar10_dls, 'untar_data')):
        with pytest.raises(FileNotFoundError, match=how) as e: f(tmp_path/'nowhere')
        assert str(tmp_path/'nowhere') in str(e.value)

@pytest.fixture
def cifar(tmp_path):
    rng = np.random.default_rng(0)
    for part in ('train', 'test'):
        for c in cifar_vocab:
            (tmp_path/part/c).mkdir(parents=True)
            for i in range(3):
                noise = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(noise).save(tmp_path/part/c/f'{i}.png')
    return tmp_path

def test_cifar_from_folders(cifar):
    dls = cifar10_dls(cifar, bs=8)
    x,y = dls.one_batch()
    assert x.shape==(8, 3, 32, 32) and [len(dl.dataset) for dl in dls]==[27, 3, 30]
    assert dls.test.dataset.name=='CIFAR-10 (image folder)'
    ims = {np.asarray(Image.open(f)).transpose(2, 0, 1).tobytes() for f in cifar.glob('test/*/*')}
    assert ims=={o.numpy().tobytes() for o in dls.test.dataset.x}

def test_cifar_damaged(cifar):
    f = cifar/'train'/'cat'/'1.png'
    f.write_bytes(f.read_bytes()[:40])
    with pytest.raises(ValueError, match='cat.1.png is damaged'): cifar10_dls(cifar)
    Image.new('RGB', (16, 16)).save(f)
    with pytest.raises(ValueError, match='cat.1.png is damaged'): cifar10_dls(cifar)
    f.unlink(); (cifar/'test'/'dog').rename(cifar/'test'/'hound')
    with pytest.raises(ValueError, match='test.dog is missing'): cifar10_dls(cifar)

cifar_batches = *(f'data_batch_{i}' for i in range(1, 6)), 'test_batch'

@pytest.mark.parametrize('protocol', [2, 5])
def test_cifar_from_batches(tmp_path, protocol):
    folder = tmp_path/'cifar-10-batches-py'
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in cifar_batches:
        d = dict(batch_label=name, data=rng.integers(0, 256, (10, 3072), dtype=np.uint8), labels=list(range(10)))
        (folder/name).write_bytes(pickle.dumps(d, protocol=protocol))
    dls = cifar10_dls(tmp_path)
    assert [len(dl.dataset) for dl in dls]==[45, 5, 10] and dls.valid.dataset.name=='CIFAR-10'
    (folder/'data_batch_3').write_bytes((folder/'data_batch_3').read_bytes()[:500])
    with pytest.raises(ValueError, match='data_batch_3 is damaged'): cifar10_dls(tmp_path)

def test_a_pickle_runs_nothing(tmp_path):
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'owned'),)
    folder = tmp_path/'cifar-10-batches-py'
    folder.mkdir()
    for name in cifar_batches: (folder/name).write_bytes(pickle.dumps({'data': Evil(), 'labels': []}))
    with pytest.raises(ValueError, match='mkdir'): cifar10_dls(tmp_path)
    assert not (tmp_path/'owned').exists()

def test_splits_do_not_depend_on_anybodys_seed_or_leak():
    torch.manual_seed(1); a = digits_dls(n_train=500, n_test=50)
    torch.manual_seed(2); b = digits_dls(n_train=500, n_test=50)
    for p,q in zip(a, b): assert torch.equal(p.dataset.x, q.dataset.x)
    assert [len(o.dataset) for o in a]==[450, 50, 50]
    seen = [{im.numpy().tobytes() for im in dl.dataset.x} for dl in a]
    assert not seen[0]&seen[2] and not seen[1]&seen[2] and not seen[0]&seen[1]

def test_bytes_and_floats_are_the_same_images():
    y = torch.arange(10); b = torch.randint(256, (10, 3, 4, 4), dtype=torch.uint8)
    x1,x2 = (image_dls((o, y), (o, y), bs=9).train.new(shuffle=False).one_batch()[0] for o in (b, b/255))
    assert torch.allclose(x1, x2)

def test_fastai_finds_its_way(tmp_path):
    "What fastai does with any image data: show, predict, interpret, export"
    from fastai.vision.all import ClassificationInterpretation, Learner
    from adverfine.evaluation.metric import RobustAccuracy
    from adverfine.attacks.gradient import PGD
    from adverfine.networks.zoo import cnn8
    dls = digits_dls(normalize=(.5,.5), n_train=200)
    learn = Learner(dls, cnn8(size=8), metrics=RobustAccuracy(PGD(.1, steps=1)), path=tmp_path)
    learn.dls.show_batch()
    with learn.no_bar():
        learn.show_results()
        assert [len(o) for o in learn.get_preds(ds_idx=2)]==[500, 500]
        assert ClassificationInterpretation.from_learner(learn).confusion_matrix().shape==(10, 10)
    learn.export('m.pkl')
    assert (tmp_path/'m.pkl').exists()

@pytest.mark.parametrize('kind', ['floats', 'bytes'])
@pytest.mark.parametrize('normalize', [None, (.5,.25)])
def test_fastai_predicts_interprets_and_exports(tmp_path, kind, normalize):
    "The triple of `learn.predict` is the network's own answer, for an image of any kind, also after export"
    import matplotlib.pyplot as plt
    from fastai.interpret import ClassificationInterpretation
    from fastai.learner import Learner, load_learner
    from adverfine.networks.zoo import cnn8
    from adverfine.threat import pixel_space
    names,g = [f'class {o}' for o in 'abcdefghij'],torch.Generator().manual_seed(0)
    x,y = torch.randint(256, (60, 1, 8, 8), dtype=torch.uint8, generator=g),torch.arange(60)%10
    if kind=='floats': x = x/255
    dls = image_dls((x, y), (x, y), vocab=names, normalize=normalize, bs=16)
    torch.manual_seed(0)
    learn = Learner(dls, cnn8(size=8), path=tmp_path)
    image = x[7]
    as_bytes = image if kind=='bytes' else (image*255).round().byte()
    Image.fromarray(as_bytes[0].numpy()).save(tmp_path/'7.png')
    want = pixel_space(dls).wrap(learn.model.eval())((as_bytes/255)[None].to(dls.device)).softmax(1)[0].cpu()
    file = tmp_path/'7.png'
    pair = dls.valid_ds.__class__(x[7:8], y[7:8], names)[0]
    def answers(learn):
        with learn.no_bar():
            for item in image, as_bytes/255, as_bytes.numpy(), Image.open(file), file, str(file), pair:
                name,number,probabilities = learn.predict(item)
                assert torch.allclose(probabilities, want, atol=1e-6, rtol=0)
                assert name==names[int(want.argmax())] and number==want.argmax()
    answers(learn)
    with learn.no_bar():
        def top_losses(): ClassificationInterpretation.from_learner(learn).plot_top_losses(4)
        for draw in dls.show_batch, learn.show_results, top_losses:
            plt.close('all')
            draw()
            assert sum(bool(ax.images) for ax in plt.gcf().axes)>=4
        labelled = dls.test_dl([(x[k], y[k]) for k in range(20)])
        assert torch.equal(learn.get_preds(dl=labelled)[1].as_subclass(torch.Tensor), y[:20])
        assert learn.get_preds(dl=dls.test_dl(list(x[:20])))[1] is None
    learn.export('m.pkl')
    answers(load_learner(tmp_path/'m.pkl'))

@pytest.mark.parametrize('item,why', [
    (torch.rand(8, 8), 'channel axis'), (torch.rand(1, 9, 8), r'\(1, 9, 8\).*\(1, 8, 8\)'),
    (np.zeros((8, 8, 3), np.uint8), r'\(8, 8, 3\).*\(1, 8, 8\)'),
    (Image.new('RGB', (8, 8)), r'\(3, 8, 8\).*\(1, 8, 8\)'), (torch.rand(1, 8, 8)*255, r'pixels in \[0,1\]'),
    (torch.zeros(1, 8, 8).long(), 'int64')])
def test_odd_images_are_refused(item, why):
    with pytest.raises(ValueError, match=why): digits_dls(n_train=100).test_dl([item])

def test_the_name_of_a_set_stays_with_its_images():
    dls = digits_dls(n_train=100, n_test=30)
    more = [dls.test_dl(dls.test.dataset.x[:3]), dls.test_dl([(o, 1) for o in dls.test.dataset.x[:3]]),
            dls.test.new(bs=2), dls.new_empty().train]
    assert [dl.dataset.name for dl in (*dls, *more)]==['digits']*7
    assert digits_dls(name='mine', n_train=100).train.dataset.name=='mine'
    x,y = torch.rand(10, 1, 4, 4),torch.arange(10)
    assert image_dls((x, y), (x, y)).test.dataset.name==''

def test_folders_of_parts_by_other_names(tmp_path):
    for part in ('Training', 'Test'):
        for kind in ('a', 'b'):
            (tmp_path/part/kind).mkdir(parents=True)
            for k in range(4): Image.new('L', (6, 6), 60*k).save(tmp_path/part/kind/f'{k}.png')
    dls = folder_dls(tmp_path, valid_pct=.25)
    assert list(dls.vocab)==['a', 'b'] and [len(o.dataset) for o in dls.loaders]==[6, 2, 8]
    with pytest.raises(ValueError, match='size=0: images have 1 pixel'): folder_dls(tmp_path, size=0)

def test_images_of_mixed_kinds_are_refused():
    x,y = torch.randint(256, (9, 1, 4, 4), dtype=torch.uint8),torch.arange(9)%3
    for other in x/255,x[:,:,:3]:
        with pytest.raises(ValueError, match='differ in kind or shape'): image_dls((x, y), (other, y))
    with pytest.raises(ValueError, match='labels must be whole numbers'): image_dls((x, y/2), (x, y))
