"""stub"""


class Files:
    def __init__(self, endpoint, token):
        pass

    def close(self):
        pass


class Mirror:
    def __init__(self, *a):
        pass

    def start(self):
        pass

    def stop(self):
        pass


def fetch_checkpoint(files, run, step):
    raise NotImplementedError


def send_checkpoint(files, run, step):
    raise NotImplementedError
