package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"
	"sigs.k8s.io/sig-storage-lib-external-provisioner/v13/controller"
)

const (
	provisionerName = "volumes.modelcache.test"
	// mkfs.xfs calls a smaller file system unsupported; it works, and tests want small volumes too.
	smallestSupportedXFS = 300 << 20
)

// volumes gives every claim an XFS file system of exactly the size it asked for, on a loop device, so that a full volume is really full.
// As on real block storage, its root belongs to root and is closed to others (0755), and it grows while it is mounted.
type volumes struct {
	client kubernetes.Interface
	root   string // a folder with NAME.img and the mount point NAME for every PersistentVolume NAME
	node   string
}

func (p volumes) mountPoint(volume string) string { return filepath.Join(p.root, volume) }
func (p volumes) image(volume string) string      { return filepath.Join(p.root, volume+".img") }

func (p volumes) Provision(ctx context.Context, o controller.ProvisionOptions) (*v1.PersistentVolume, controller.ProvisioningState, error) {
	shared := o.StorageClass.Parameters["shared"] == "true"
	if !shared && slices.ContainsFunc(o.PVC.Spec.AccessModes, isShared) {
		return nil, controller.ProvisioningFinished, fmt.Errorf("storage class %s offers ReadWriteOnce only, asked for was %v", o.StorageClass.Name, o.PVC.Spec.AccessModes)
	}
	size := o.PVC.Spec.Resources.Requests[v1.ResourceStorage]
	if err := p.create(ctx, o.PVName, size.Value()); err != nil {
		return nil, controller.ProvisioningFinished, errors.Join(err, p.remove(o.PVName))
	}
	reach := v1.NodeSelectorRequirement{Key: v1.LabelHostname, Operator: v1.NodeSelectorOpIn, Values: []string{p.node}}
	if shared {
		reach = v1.NodeSelectorRequirement{Key: v1.LabelHostname, Operator: v1.NodeSelectorOpExists}
	}
	return &v1.PersistentVolume{
		ObjectMeta: metav1.ObjectMeta{Name: o.PVName},
		Spec: v1.PersistentVolumeSpec{
			PersistentVolumeReclaimPolicy: *o.StorageClass.ReclaimPolicy,
			AccessModes:                   o.PVC.Spec.AccessModes,
			Capacity:                      v1.ResourceList{v1.ResourceStorage: size},
			PersistentVolumeSource:        v1.PersistentVolumeSource{Local: &v1.LocalVolumeSource{Path: p.mountPoint(o.PVName)}},
			NodeAffinity: &v1.VolumeNodeAffinity{Required: &v1.NodeSelector{
				NodeSelectorTerms: []v1.NodeSelectorTerm{{MatchExpressions: []v1.NodeSelectorRequirement{reach}}}}},
		},
	}, controller.ProvisioningFinished, nil
}

func isShared(mode v1.PersistentVolumeAccessMode) bool {
	return mode == v1.ReadWriteMany || mode == v1.ReadOnlyMany
}

func (p volumes) create(ctx context.Context, name string, bytes int64) error {
	image, dir := p.image(name), p.mountPoint(name)
	// The provisioner may ask again before it sees its own volume; an attempt that failed left nothing.
	if err := os.Mkdir(dir, 0o755); errors.Is(err, os.ErrExist) {
		return nil
	} else if err != nil {
		return err
	}
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		return err
	}
	if err := os.Truncate(image, bytes); err != nil {
		return err
	}
	format := []string{"mkfs.xfs", "-q"}
	if bytes < smallestSupportedXFS {
		format = append(format, "--unsupported")
	}
	if _, err := run(ctx, append(format, image)...); err != nil {
		return err
	}
	_, err := run(ctx, "mount", "-t", "xfs", "-o", "loop", image, dir)
	return err
}

func (p volumes) Delete(_ context.Context, volume *v1.PersistentVolume) error {
	return p.remove(volume.Name)
}

// remove undoes create, wherever that got to. It has no context: a half-removed volume would leave its loop device behind.
func (p volumes) remove(name string) error {
	dir := p.mountPoint(name)
	if err := syscall.Unmount(dir, 0); err != nil && !errors.Is(err, syscall.EINVAL) && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("unmount %s: %w", dir, err)
	}
	for _, path := range []string{dir, p.image(name)} {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// run returns what a command printed, or an error with it.
func run(ctx context.Context, argv ...string) (string, error) {
	out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s: %w: %s", strings.Join(argv, " "), err, strings.TrimSpace(string(out)))
	}
	return strings.TrimSpace(string(out)), nil
}

func runVolumes() {
	kubeconfig := flag.String("kubeconfig", "", "who to be")
	root := flag.String("root", "", "folder of the volumes")
	node := flag.String("node", "", "name of the node that has them")
	flag.Parse()
	config, err := clientcmd.BuildConfigFromFlags("", *kubeconfig)
	if err != nil {
		klog.Exit(err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	client := kubernetes.NewForConfigOrDie(config)
	p := volumes{client: client, root: *root, node: *node}

	factory := informers.NewSharedInformerFactory(client, expansionRetry)
	if err := p.watchExpansions(ctx, factory.Core().V1().PersistentVolumeClaims().Informer()); err != nil {
		klog.Exit(err)
	}
	factory.Start(ctx.Done())
	controller.NewProvisionController(ctx, client, provisionerName, p, controller.LeaderElection(false)).Run(ctx)
}
