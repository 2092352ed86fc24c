"Studies of images and networks of one's own: folders, torchvision, timm, files, loggers"
import json
import numpy as np, pandas as pd, pytest
from PIL import Image
from adverfine.cli import main
from adverfine.attacks.gradient import PGD
from adverfine.study.comparison import compare
from adverfine.study.folder import read_study
from adverfine.study.names import disagreement
from adverfine.study.protocol import Compression, FineTune, Judge
from adverfine.study.study import Study

@pytest.fixture
def pets(tmp_path):
    "A folder of bright and dark images, 18 by 18 pixels"
    rng = np.random.default_rng(0)
    for name,base in (('bright', 150), ('dark', 20)):
        (tmp_path/'pets'/name).mkdir(parents=True)
        for k in range(40):
            a = (base + rng.integers(0, 80, (18, 18, 3))).astype(np.uint8)
            Image.fromarray(a).save(tmp_path/'pets'/name/f'{k}.png')
    return tmp_path/'pets'

few = ('--levels 0.5 --bits --joint 0.25:8 --fine-tunings none --epochs 1 --bs 16 --steps 2 --n 12 --no-escalate '
       '--no-bf16')

@pytest.mark.parametrize('network', ['torchvision:resnet18', 'timm:resnet10t', 'cnn8'])
def test_a_folder_and_a_network_by_name(pets, network, capsys):
    if network.startswith('timm'): pytest.importorskip('timm')
    out = pets.parent/'out'
    assert main(['study', '--data', str(pets), '--network', network, '--out', str(out), *few.split()])==0
    df = pd.read_csv(out/'results.csv')
    assert set(df.label)=={'none-0', 'prune-0.5', 'prune-0.25-quantize-8'} and set(df.data)=={'pets'}
    dense,pruned,joint = (df[df.label==o].iloc[0] for o in ('none-0', 'prune-0.5', 'prune-0.25-quantize-8'))
    assert pruned.params<dense.params/2 and joint.bytes<dense.bytes/3 and (df.n==12).all()
    assert read_study(out).protocol['data']=={'name': 'pets', 'classes': 2, 'shape': [3, 18, 18], 'images': [58, 6, 16]}
    assert 'pruned 50%' in capsys.readouterr().out

@pytest.mark.parametrize('spoil,why', [
    (lambda d: (d/'dark'/'0.png').write_bytes(b'no image'), '0.png is no image that can be read'),
    (lambda d: Image.new('I;16', (18, 18)).save(d/'dark'/'0.png'), "kind 'I;16', not of 8 bits"),
    (lambda d: Image.new('RGB', (18, 20)).save(d/'dark'/'0.png'), '0.png is not 18x18 pixels'),
    (lambda d: (d/'dark').rename(d.parent/'dark'), 'holds 1 folders of images: two or more classes')])
def test_folders_that_cannot_be_read_are_named_before_hours_are_lost(pets, spoil, why, capsys):
    spoil(pets)
    assert main(['study', '--data', str(pets), '--network', 'cnn8', '--out', str(pets.parent/'out')])==2
    assert why in capsys.readouterr().err and not (pets.parent/'out').exists()

def test_a_network_that_does_not_fit_is_told_before_hours_are_lost(pets, capsys):
    "Also where images of many sizes are brought to one"
    Image.new('RGB', (18, 20)).save(pets/'dark'/'0.png')
    asked = ['study', '--data', str(pets), '--network', 'cnn8', 'size=28', '--out', str(pets.parent/'out')]
    assert main([*asked, '--size', '20'])==2
    assert 'does not take images of shape (3, 20, 20)' in capsys.readouterr().err

def test_a_study_from_a_file(tmp_path, capsys):
    text = ('data = "digits"\nnetwork = "cnn8"\nn_train = 300\nn_test = 60\nbf16 = false\n'
            f'out = {json.dumps(str(tmp_path/"out"))}\n'
            'judge = {attacks = [{kind = "PGD", eps = 0.1, steps = 2}], escalate = false}\n'
            'parents = [{how = "standard", epochs = 2}]\ncompressions = [{prune = 0.5, bits = [4, 8]}]\n'
            'fine_tunings = [{how = "adversarial", epochs = 1, attack = {kind = "NFGSM", eps = 0.1}}]\n')
    (tmp_path/'own.toml').write_text(text)
    assert main(['study', str(tmp_path/'own.toml')])==0 and len(read_study(tmp_path/'out').df)==2
    (tmp_path/'own.toml').write_text(text.replace('escalate', 'escalated'))
    assert main(['study', str(tmp_path/'own.toml')])==2
    assert "own.toml: judge: 'escalated' is no field of Judge" in capsys.readouterr().err

def test_loggers_that_the_user_passes_see_each_training(tmp_path):
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    logs = tmp_path/'logs'
    def loggers():
        folder = logs/f'{len(list(logs.glob("*")))}'
        folder.mkdir(parents=True)
        return [TensorBoardCallback(folder, trace_model=False, log_preds=False)]
    study = Study('digits', 'cnn8', Compression(.5), FineTune('standard', 1), FineTune('standard', 2),
                  Judge(PGD(.1, steps=1), escalate=False), out=tmp_path/'out', n_train=300, n_test=60, bf16=False,
                  logs=loggers)
    study.run(progress=False)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    steps = []
    for folder in sorted(logs.iterdir()):
        events = EventAccumulator(str(folder)).Reload()
        steps.append(max(o.step for o in events.Scalars('train_loss')))
    assert steps==[8, 4, 4]          # a parent of two epochs and two fine-tunings of one, in batches of 64

def test_a_file_calls_no_function_that_is_no_attack(tmp_path, capsys):
    (tmp_path/'own.toml').write_text('data = "digits"\nnetwork = "cnn8"\nparents = [{how = "standard"}]\n'
        'compressions = []\nfine_tunings = [{how = "adversarial", attack = {kind = "os:system", command = "true"}}]\n'
        'judge = {attacks = [{kind = "PGD", eps = 0.1}]}\n')
    assert main(['study', str(tmp_path/'own.toml')])==2
    assert 'neither an attack nor an objective' in capsys.readouterr().err

def test_calls_with_and_without_an_argument_differ():
    "resnet18_cifar with and without a width are two networks; an older protocol without a field is the same"
    there = dict(network=dict(kind='a:net', width=16), judge=dict(n=3))
    assert disagreement(there, dict(network=dict(kind='a:net'), judge=dict(n=3, seed=0)))
    assert not disagreement(there, dict(network=dict(kind='a:net', width=16), judge=dict(n=3, seed=0)))

def test_studies_of_one_name_are_compared(tmp_path):
    rows = 'parent,compression,level,fine_tuning,clean,robust\nstandard,prune,0.5,none,0.9,0.1\n'
    for name in 'a.csv','a.txt': (tmp_path/name).write_text(rows)
    assert len({*compare(tmp_path/'a.csv', tmp_path/'a.txt').columns[-2:]})==2
    (tmp_path/'a.txt').write_text(rows.replace('0.1', ''))
    with pytest.raises(ValueError, match='row 1 has no number for robust'): compare(tmp_path/'a.csv', tmp_path/'a.txt')
