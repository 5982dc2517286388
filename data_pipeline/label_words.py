"""The vocabulary of `data_pipeline.label_names`: words that a structure's name may be made of.

Sources: Terminologia Anatomica (general terms), AAPM TG-263 structure names, the classes of TotalSegmentator,
MSD, AMOS, BTCV, KiTS and BraTS, DICOM PS3.16 CID 7150 to 7166. Words that are commoner as surnames, given
names or initials than in names of structures stand only in phrases.
"""

from __future__ import annotations

_WORDS = """
aaa abdomen abdominal abdominopelvic abscess aca accessory accumbens acetabular acetabulum acromioclavicular
acromion adenocarcinoma adenohypophysis adenoma adenomas adenopathy adipose adnexa adr adrenal adrenals
adventitia afs agl airway airways alae alba allocortex alveolar alveolus ampulla amygdala anal analcanal
anastomosis and aneurysm aneurysms angioma angular ankle ankles annular annulus anomalous ant antecubital
anterior anteroinferior anterolateral anterolisthesis anteromedial anterosuperior antrum anus aort aorta
aortic aorto apex apical appendage appendicular appendix applicator aqueduct arachnoid arch arcuate area areas
areola arm arms arota arterial arteries arteriole arteriosum arteriosus arteriovenous artery articular
articulation arytenoid arytenoids ascending ascites astrocytoma atelectasis atheroma atlas atria atrial
atrioventricular atrium atrophy auditory auricle auricula auricular autochthon autochthonous autonomic avm
avoid axial axilla axillary axis azygos background balloon basal basilar basilic basin bbb bed bicep biceps
bicornuate bicuspid bifurcation bil bilat bilateral bile biliary biopsy blad bladder bleed bleeding blood bone
bonemarrow bones bony border bothkidneys bothlungs boundary bowel bowelbag box brachial brachialis
brachialplex brachialplexus brachii brachiocephalic brachioradialis brain brainstem braintumor braintumour
branch branches breast breasts bridging bronc bronch bronchi bronchial bronchiole bronchioles bronchtree
bronchus brst bruise buccal buccinator bulb bulbospongiosus bundle bursa buttock buttocks caecum calcaneum
calcaneus calcarine calcification calcifications calcified calcium calf callosal callosum calvaria calvarium
calyces calyx canal canaliculus canals cancellous cancer cancerous cancers capillaries capillary capitate
capsule carcinoma cardia cardiac cardiovascular carina carnae carotid carotids carpal carpals carpus cartilage
cartilages catheter cauda caudal caudate cav cava cavae cavernoma cavernosum cavernous cavitation cavities
cavity cavoatrial cc cca cecum celiac celiacum center central centre cephalic cerebellar cerebellum cerebr
cerebral cerebri cerebritis cerebrospinal cerebrum cervical cervix cgy chamber cheek cheeks chest chiasm
chiasma cholangiocarcinoma chondrosarcoma chord chorda chordae chordoma choroid choroidal ciliary cingulate
cingulum circumflex cisterna cisternae cisterns class claustrum clav clavicle clavicles clavicula claviculae
clear clinoid clip clips clivus clot cm cn cns coccygeal coccyx cochlea cochleae cochleal cochlear coeliac
coeliacum coil coils colic colitis collapse collateral collaterals colli colon colonic colorectal column
combined commissure common communicating communis complete complex component conal concha conchae conduction
condyle condyles confluence connective consolidation consolidations constrict constrictor constrictors contour
contralateral contrast contrasted contusion conus cor coracoid cord cordis cords core cornea corneas corona
coronal coronary corpora corpus cortex cortical cortices corticospinal costa costae costal costocervical
costochondral couinaud cranial craniopharyngioma cranium cribriform crico cricoid cricopharyngeal
cricopharyngeus crista crop cropped cruciate crura crural crus csf cspine ct ctr ctv ctvln ctvn ctvnd ctvp
ctvs ctvt cubital cuboid culmen cuneate cuneiform cuneiforms cuneus cusp cusps cutaneous cyst cystadenoma
cystic cysts decubitus deep defect deferens deltoid dens density dental dentate dentin dermis descending
device diagonal diaphragm diaphragmatic diaphysis diencephalon diffuse digastric digit digits disc discs
disease disk disks dissection disseminated dist distal diverticula diverticulum divided dominant dorsal dorsi
drain duct ducts ductus duod duodenal duodenojejunal duodenum duplex dura dural ear eardrum ears eca edema
edge edh effusion effusions eg elbow elbows electrode electrodes emboli embolism embolus emphysema empty
enamel endocardium endocervix endocrine endometrium endothelium endotracheal enh enhancement enhancing
enlarged enlarging enthesis entire entorhinal enucleated ependymoma epicardial epicardium epicondyle epidermis
epididymis epidural epigastric epiglottis epiphysis epithalamus epithelium erector esoph esophag esophageal
esophagogastric esophagus et ethmoid ethmoidal ethmoids ett extended extension extensor extent external
externus extra extraaxial extracapsular extracranial extrahepatic extravasation extremities extremity eye
eyeball eyeballs eyel eyelid eyer eyes face facial faeces falciform fallopian false falx fascia fasciculi
fasciculus fat feces feeding fem female femheadneck femoral femoralhead femoralheadneck femoralheads femoris
femur femurs fetal fetus fiber fibers fibre fibres fibroid fibroids fibrosis fibrotic fibula fibulae fibular
fifth filter filum fimbria finger fingers first fissure fistula fistulas flair flank flexor flexure fluid
focal foci focus fold fontanel fontanelle foot foramen forearm forebrain forefoot foreground forehead fornices
fornix fossa fourchette fourth fovea fracture fractures frenulum frontal frontalis full fundus fusiform
galbladder gall gallbladder gallblader gallstone gallstones ganglia ganglion ganglionic gas gastric
gastrocnemius gastroduodenal gastroesophageal gastrointestinal gb gej gel genicular geniculate genioglossus
geniohyoid genital genitalia genitals genu genua ggn ggo gingiva girdle gland glands glandular glans
glenohumeral glenoid glenoidal glia glioblastoma glioma gliomas gliosis glnd globe globes globus glot glottic
glottis glut gluteal gluteus gluts gm goiter gonad gonadal gonads gracilis graft granuloma greatves
greatvessels ground group gtv gtvln gtvn gtvnd gtvp gtvs gtvt gtvtb gutter gy gyri gyrus habenula haemangioma
haemangiomas haematoma haemorrhage hair half hamartoma hamate hamstring hamstrings hand hands hcc head heads
heart heel hemangioma hematoma hematomas hemi hemidiaphragm hemisphere hemispheres hemithorax hemorrhage
hemorrhages hemorrhagic hepar hepatic hepatica hepatis hepatobiliary hepatocellular hernia hiatus high hilar
hilum hindbrain hip hippo hippocampal hippocampi hippocampus hippocampusl hippocampusr hips horizontal hrctv
hum humeral humeri humerus hydatid hydrocephalus hydrogel hydronephrosis hyoid hyperintense hyperintensities
hyperintensity hypermetabolic hyperplasia hypochondriac hypodense hypodensity hypogastric hypointense
hypopharyngeal hypopharyngeus hypopharynx hypophysis hypothalamic hypothalamus ica ich ictv igtv ileitis
ileocecal ileum iliac iliaca iliacus iliocostalis iliopsoas ilium ima imat implant implants imv in inactive
incisor incisors incus index inf infarct infarction infarcts infected infection inferior infiltrate
infiltrates infiltration inflammation inflow infraclavicular infraorbital infrarenal infraspinatus
infratemporal infratemporalis infratentorial infundibulum inguinal injury inner innerear innermost innominate
insula insular interatrial intercellular intercostal interface interior interlobar interlobular intermediate
internal internus interventricular intervertebral intestinal intestine intestines intima intra intraaxial
intracerebral intracranial intrahepatic intraluminal intraparenchymal intraparietal intraspinal
intraventricular invasion invasive involved iph ipsilateral irctv ischaemia ischaemic ischemia ischemic
ischioanal ischiorectal ischium islet isthmus itv itvs ivc ivh jaw jejunoileum jejunum joint joints jugular
jugulars junction juxtaphrenic keel kidn kidney kidneylt kidneyrt kidneys knee knees knuckle kyphosis la label
labia labium labral labyrinth lacrimal lacrimalgland lacune lacunes lad lamina large largebowel largeintestine
laryngeal laryngopharynx larynx larynxsupraglottic lat lateral lateralis latissimus layer layers lca lcx
leaflet left leftkidney leftlung leg legs lemniscus length lens lenses lensl lensr lentiform lentiformis
leptomeninges lesion lesional lesions lesser leukoaraiosis levator level levels lgn lien lienalis lig ligament
ligamentous ligaments ligamentum limb limbic limbs limiting line lines lingual lingula lip lipoma liposarcoma
lips liver lll ln lns lobar lobe lobes lobulated lobule local localised localized locus longissimus
longitudinal longus loops lower lspine lt lucency lul lumbar lumbosacral lumen lumpectomy lunate lung lungl
lunglt lungnodule lungr lungrt lungs lv lvc lvm lymph lymphadenopathy lymphatic lymphatics lymphnode
lymphnodes lymphocele lymphoid lymphoma macro macula main malar male malformation malignancy malignant
malleolus malleus mammary mandible mandibular manubrium margin marginal marker marrow mask mass masses
masseter masseters mastoid mastoids mater matrix maxilla maxillae maxillary maximus mca mean meatus med media
medial medialis median mediastinal mediastinum medius medulla medullae medullaris medullary medulloblastoma
medulloblastomas melanoma membrane membranes meningeal meninges meningioma meningiomas meniscus mesencephalon
mesent mesenteric mesentery mesocolon mesoderm mesorectal mesorectum mesosalpinx mesothelioma mesovarium met
metacarpal metacarpals metaphysis metastases metastasis metastatic metatarsal metatarsals mets micro
microaneurysm microbleed microbleeds microcalcifications microhemorrhage mid midbrain middle middleear midline
minimal minimus minus mitral mitralis mixed mlv mm moderate molar molars mons motor mouth mri mucinous
mucocele mucoperiosteum mucosa mucosal multi multifidus multiple musc muscat muscle muscles muscular
muscularis musculature myelolipoma myeloma myelum mylohyoid myo myocardial myocardium myoma myometrium nac
name nares naris nasal nasi nasion nasopharyngeal nasopharynx native navicula navicular ncr nd near neck
necroses necrosis necrotic needle negative neoplasia neoplasm neoplasms neoplastic nerve nerves nervous net
netc neural neuroblastoma neurohypophysis neuroma neurovascular nevus nigra nipple nipples no nodal node nodes
nodular nodule nodules non nonenhancing normal nose nostril nostrils not notch nrv nuchal nuclei nucleus oar
oars object oblique obliquus oblongata obstruction obturator occipital occiput occlusal occlusion ocular
odontoid odontoma oedema oes oesoph oesophageal oesophagus of olecranon olfactorius olfactory olivary omental
omentum omohyoid opacities opacity operated operative opercular operculum ophthalmic opt optic optical
opticchiasm opticnerve opticnervel opticnerver opticnrv or oral oralcavity orbicularis orbit orbital orbitalis
orbitofrontal orbits organ organs oropharyngeal oropharynx os ossicle ossicles ossification osteoma osteophyte
osteosarcoma ostium other outer outflow outline outside ovarian ovaries ovary overlap oviduct ovoid ovoids
pacemaker palate palatine pallidum pallidus palmar pampiniform panc pancreas pancreatic pancreaticoduodenal
pancreatitis papilla papillary paraaortic paracolic paraduodenal paraesophageal paraganglioma paragangliomas
parahilar parahippocampal paralimbic parametrial parametrium paranasal pararectal paraspinal parasternal
parasympathetic parathyroid parathyroids paratracheal paravertebral parenchyma parietal parot parotid
parotidgland parotidglands parotidl parotidr parotids pars part partial parts patella patellae patellar patent
pathologic pathological pathology pathway pathways pca pda pectineus pectoral pectoralis pedicle pedis
peduncle pelvic pelvis penile penilebulb penis penises penumbra perforating perforator perforators perfusion
peri perianal periaqueductal pericallosal pericardial pericardium pericyte perihematomal perihilar
perilesional perineal perineum perineural periosteum peripancreatic peripheral periportal perirectal
peritoneal peritoneum peritonsillar peritumoral peritumoural perivesical peroneal pet petrosal petrous
phalanges phalanx pharyngeal pharynx phlegmon phrenic pia pineal piriformis pisiform pituitary placenta plain
plana plantar planum plaque plaques platysma pleura pleural plex plexal plexus plug plus pneumonia
pneumothorax pns polyp polyps pons pontine popliteal popliteus port porta portahepatis portal portion positive
possible post postcava postcentral posterior posterolateral posterolaterally posteromedial postoperative pouch
pre precentral precuneus prefrontal premaxilla premolar premolars preoperative prepuce preputial presacral
preserved prevertebral primaries primary probable procerus process profunda pronator proper prost prostata
prostate prostatic prosthesis prosthetic prox proximal prv pseudo psoas pterygoid pterygoids pterygopalatine
ptv ptvs pubes pubic pubis pubococcygeus puborectalis pudendal pulm pulmo pulmonary pulmonic pulmonis pulp
pulposus pupil putamen putamina pv pyelonephritis pyloric pylorus pz quadrant quadratus quadriceps
quadrilateral ra rad radial radiation radiations radii radius ramus rc rca rd recess rectal recti rectosigmoid
rectouterine rectovaginal rectovesical rectum rectus recurrence recurrent reference region regional remainder
remaining ren renal renalis resected resection residual rest retina retinae retinal retinas retinoblastoma
retroaortic retrobulbar retrocrural retromolar retroperitoneal retroperitoneum retropharyngeal retrosternal
rhinencephalon rhomboid rib ribs right rightkidney rightlung rim rima ring risk rll rml roi root roots rostral
rotator rt rtss rul rupture rv rvc sac saccule sacral sacrococcygeal sacroiliac sacroiliitis sacrum sagittal
sagittalis sagittally sah salivary sample saphenofemoral saphenopopliteal saphenous sarcoma sartorius sat
scala scalene scalp scap scaphoid scapula scapulae scapular scar scars schwannoma sciatic sclera sclerosis scm
screw screws scrotal scrotum sdh second secondary seed seeds segment segmental segmentation segments segs
sella sellar semicircular semimembranosus seminal seminalvesicle seminalvesicles seminoma semispinalis
semitendinosus septa septae septal septum seroma serratus sesamoid severe shape sheath shell shoulder
shoulders shunt side sigmoid sinoatrial sinus sinuses sinusoid site skeletal skeleton skin skull sma
smallbowel smallintestine smv snfh softtissue sole soleus solid space spacer spared spermatic sphenoid
sphenoidal sphincter spiculated spinae spinal spinalcanal spinalcord spinalis spindle spine spines spinosus
spinous spl spleen splenic splenium splenius spleno splenoma spot spots squamous st stage stapes station stem
stenosis stent stents sternal sternoclavicular sternocleidomastoid sternohyoid sternothyroid sternum stom
stomach stones striatum stripe stroke structure structures sub subarachnoid subcallosal subcarinal subclavian
subcortical subcostal subcut subcutaneous subcutis subdural sublingual sublobar submand submandib
submandibular submandibularglands submental submucosa subpleural subscapularis subsegmental subsolid
substantia subthalamic subventricular subxiphoid sulci sulcus sup superciliary superficial superior
supplementary supraclavicular supraglot supraglottic supraglottis suprahyoid supramarginal suprapulmonic
suprarenal suprasellar supraspinatus suprasternal supratentorial supraventricular surface surgical surrounding
suspected suspicious suture suv sv svc swelling sympathetic symphysis synovial synovium system systemic
systems tail talus tandem target tarsal tarsals tarsus tc tear tectum teeth tegmentum telencephalon temporal
temporalis temporallobe temporallobes temporomandibular tendineae tendinous tendon tendons tensor tentorium
teratoma teres terminal terminalis territory testes testicle testicles testicular testis tfl thalami thalamic
thalamus the thecalsac thenar thick thigh thighs thin third thoracic thoracis thoracoabdominal thoracolumbar
thorax throat thrombi thrombosis thrombus thumb thymic thymus thyroarytenoid thyrocervical thyrohyoid thyroid
thyroidgland tibia tibiae tibial tibialis tip tissue tissues tmj to toe toes tongue tonsil tonsils tooth
torcula torso torsos torus tot total trabeculae trachea tracheal trachealis tracheobronchial tracheostomy
tract tracts transluminal transplant transposition transversalis transverse transversum transversus trapezium
trapezius trapezoid triangular triangularis triatriatum triceps tricuspid trigeminal trigone triquetral
trochanter trochanters trochlear true truncal trunk trunks tspine tube tubercle tuberosity tumor tumoral
tumorous tumors tumour tumoural tumours tunica tunnel turbinate turbinates turcica tympanic type tz ulcer ulna
ulnae ulnar umbilical umbilicus umbo uncinate uncus uninvolved unknown unspecified untreated upper ureter
ureteral ureters urethra urethral urinaria urinary urinarybladder urine uro uteri uterine uterocervix uterus
utricle uvea uveal uvula vagal vagina vaginal vagus vallecula valleculae valve valves valvular varices varix
vas vascular vasculature vasculatures vasculitis vastus vat vb vc vegetation vein veins vena venacava venae
venous ventral ventricle ventricles ventricular vermian vermis vert vertb vertebra vertebrae vertebral
vertebralbody verts ves vesica vesical vesicle vesicles vessel vessels vestibular vestibularis vestibule
vestibulocochlear viable villi viscera visceral vitreal vitreous vocal void volar volume vomer vulva vulvar
whole wire wires with within without wm wmh wrist wt xiphisternum xiphoid zone zones zygoma zygomatic
zygomaticus
"""
_PHRASES = """
abdominal wall | achilles tendon | active tumor | active tumour | air gap | aortic wall | bag bowel |
baker cyst | bartholin gland | bile duct | bile ducts | bladder stone | bladder wall | body cavity |
body fluid | body of | bowel bag | broad ligament | broca area | brown fat | bulb of penis | carotid body |
carpal tunnel | caudate body | cheek mucosa | chest wall | ciliary body | circle of willis | corpus body |
costal arch | cowper gland | dead space | douglas pouch | esophagus wall | eustachian tube | fallopian tube |
fat pad | flat bones | foot bones | foreign body | frontal pole | gallbladder stone | gastric body |
gerota fascia | gray matter | gray white | great cardiac | great saphenous | great vessel | great vessels |
grey matter | grey white | gross disease | gross target | gross tumor | gross tumour | ground glass |
ground truth | hand bones | hard palate | heart chambers | heschl gyrus | high grade | high risk | hoffa fat |
hoffa pad | inferior olive | inner ear | islets of langerhans | kidney stone | large bowel | large intestine |
long axis | long bones | long head | low density | low grade | low risk | lower pole | mamillary bodies |
mammillary body | meckel cave | middle ear | morison pouch | mr vertebra | myocardial wall | nerve bundle |
occipital pole | pancreas body | pancreatic body | pectoralis major | pectoralis minor | pelvic floor |
pouch of douglas | psoas major | psoas minor | rectal wall | rectum wall | red nucleus | resection cavity |
rhomboid major | rhomboid minor | rolandic fissure | rosenmuller fossa | short axis | short head | small bowel
| small intestine | soft palate | soft tissue | soft tissues | sternum body | stomach body | stomach wall |
superior olive | sylvian fissure | temporal pole | teres major | teres minor | trochanter major |
trochanter minor | tumor bed | tumour bed | upper pole | uterine body | vaginal cuff | vertebra body |
vertebra mr | vertebral bodies | vertebral body | vessel wall | visual field | waldeyer ring | wall of |
wernicke area | white matter | white substance
"""
#: Lower-case words, each of which may stand anywhere.
WORDS = frozenset(_WORDS.split())
#: Words that count only together and in this order. (`vertebra` stands for T1 and its like: MR_T1.)
PHRASES = frozenset(tuple(phrase.split()) for phrase in _PHRASES.split("|"))
