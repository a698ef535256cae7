"""The 478 face landmarks: their numbers, and the groups of them that have names.

0..467 are the MediaPipe face mesh, 468..472 the iris of the subject's right eye and 473..477 that of the
left one (centre, then the rim towards the nose, above, away from it, below).
"""

N_POINTS = 478
LANDMARK_SET = "mediapipe478"  # its name in `HeadAsset.landmarks`
OUTER_EYE_CORNERS = (33, 263)

# Where the oval of the face is on the head depends on the head model, and under rotation the network slides
# it along the silhouette.
FACE_OVAL = (
    *(10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377, 152),
    *(148, 176, 149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109),
)

# Eyelids of each eye in the order of the iris network's first 16 contour points: lower lid from the outer to
# the inner corner, then the upper lid.
LIDS_RIGHT = (33, 7, 163, 144, 145, 153, 154, 155, 133, 246, 161, 160, 159, 158, 157, 173)
LIDS_LEFT = (263, 249, 390, 373, 374, 380, 381, 382, 362, 466, 388, 387, 386, 385, 384, 398)
IRIS_RIGHT, IRIS_LEFT = slice(468, 473), slice(473, 478)
IRISES = tuple(range(468, 478))
