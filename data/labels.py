"""The 14 classes of CheXpert (Irvin et al. 2019), in the order of every label vector here.

1 positive, 0 negative, -1 uncertain, -2 not stated.
"""

CHEXPERT = (
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
    "No Finding",
)
NOT_STATED = -2
